"""A checkpoint means the same however the layers are divided: tensor-parallel sizes 1, 2 and 4, in any ZeRO stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import deepspeed
import pytest
import torch
import torch.distributed as distributed
from full_state import FullState, assert_bitwise_equal, full_state, reported_state
from ranks import run_ranks
from tiny_engine import GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, Layout, engine_config
from torch import Tensor

from deberta_xl.checkpoint.rank_file import KINDS
from deberta_xl.checkpoint.store import load_checkpoint, save_checkpoint
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.parallel import layers  # noqa: F401  (so that the ranks, which are forked, need not import megatron-core)
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.shard import shard_of
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native import read_weights

#: 37 divides by neither 2 nor 4, so the vocabulary is padded.
CONFIG = DebertaConfig(
    vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, position_buckets=4,
    max_position_embeddings=SEQUENCE, conv_kernel_size=3, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
SAVED_STEP, LAST_STEP = 2, 4


class Division(NamedTuple):
    """A layout of engine and layers."""

    tensor_size: int
    engine: Layout
    """Its `world_size` is the data-parallel size here."""

    @property
    def ranks(self) -> tuple[int, int]:
        """All ranks, and those that share a layer; layouts with the same can share one set of processes."""
        return self.tensor_size * self.engine.world_size, self.tensor_size

    @property
    def label(self) -> str:
        """Short, for test ids and folder names."""
        return f"tp{self.tensor_size}-{self.engine.label}"


FP32 = [
    Division(1, Layout(2, 2)),
    Division(2, Layout(1, 1)),
    Division(2, Layout(2, 1)),
    Division(2, Layout(2, 3, persistence_threshold=0)),
    Division(4, Layout(1, 3, persistence_threshold=0)),
]
DIVISIONS = [
    *FP32,
    Division(2, Layout(2, 2, "bf16")),
    Division(2, Layout(2, 3, "bf16")),
    Division(2, Layout(2, 1, "bf16_fp32_gradients")),
]


class Report(NamedTuple):
    """What one rank of a run that was never interrupted tells."""

    state: FullState
    """DeepSpeed's own account of the rank's slices at the saved step, gathered over the data-parallel ranks."""
    cut: dict[str, int]
    """Name → dimension, for what is divided."""
    losses: list[float]
    """Of the steps after it."""


class Campaign(NamedTuple):
    """Every layout's run, and each of them resumed in every layout."""

    root: Path
    reports: dict[Division, list[Report]]
    """By rank."""
    losses: dict[tuple[Division, Division], list[float]]
    """(saved in, resumed in) → losses of the steps after the saved one."""


def join(tensor_size: int) -> Groups:
    """This rank's groups."""
    return build_groups(Grid.of(distributed.get_rank(), distributed.get_world_size(), tensor_size))


def place(groups: Groups) -> tuple[int, int]:
    """(size, rank) in the tensor-parallel group."""
    return groups.grid.tensor_parallel_size, groups.grid.tensor_parallel_rank


def build_engine(division: Division, groups: Groups, *, seed: int = 1) -> deepspeed.DeepSpeedEngine:
    """A fresh engine with weights from `seed` and two parameter groups."""
    model = MaskedLanguageModel(CONFIG, seed=seed)
    divide(model, groups)
    parameter_groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameter_groups, lr=1e-2),
        config=engine_config(division.engine),
        mpu=groups.model_parallel_unit(),
    )
    return engine


def micro_batches(step: int, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the ids and labels of a step; each row has the same number of labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, CONFIG.vocab_size, (GLOBAL_BATCH, SEQUENCE), generator=generator)
    labels = torch.where(torch.arange(SEQUENCE) % 3 == 1, ids, 0)
    ids, labels = (x.chunk(grid.data_parallel_size)[grid.data_parallel_rank] for x in (ids, labels))
    yield from zip(ids.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True)


def train(engine: deepspeed.DeepSpeedEngine, groups: Groups, first: int, last: int) -> list[float]:
    """Steps `first` to `last` (inclusive); the global loss of each."""
    losses = []
    for step in range(first, last + 1):
        total = torch.zeros(())
        for ids, labels in micro_batches(step, groups.grid):
            loss = engine(ids, labels=labels, label_count=float((labels > 0).sum())).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        distributed.all_reduce(total, group=groups.data_group)
        losses.append(total.item() * MICRO_BATCH / GLOBAL_BATCH)
    return losses


def folder_of(root: Path, saved_in: Division, resumed_in: Division | None) -> Path:
    """The saved step of an original run, or of a resumed one."""
    return root / saved_in.label / (resumed_in.label if resumed_in else "original") / f"step-{SAVED_STEP:08d}"


def run_originals(divisions: list[Division], root: Path) -> dict[Division, Report]:
    """Train each layout without interruption, saving on the way."""
    groups = join(divisions[0].tensor_size)
    reports = {}
    for division in divisions:
        engine = build_engine(division, groups)
        cut = {name: shard.dim for name, p in engine.module.named_parameters() if (shard := shard_of(p)) is not None}
        train(engine, groups, 1, SAVED_STEP)
        checkpoints = folder_of(root, division, None).parent
        save_checkpoint(engine, checkpoints, {"step": SAVED_STEP}, extra_files={}, tensor_parallel=place(groups))
        state = reported_state(engine)
        reports[division] = Report(state, cut, train(engine, groups, SAVED_STEP + 1, LAST_STEP))
    return reports


def resume_all(divisions: list[Division], root: Path) -> dict[tuple[Division, Division], list[float]]:
    """Load every original in each of `divisions`, save it again, and train on.

    An engine is fresh (other weights, no Adam state) for its own original, and has run when it loads the others'.
    """
    groups = join(divisions[0].tensor_size)
    losses = {}
    for division in divisions:
        engine = build_engine(division, groups, seed=9)
        for source in sorted(DIVISIONS, key=lambda candidate: candidate != division):
            state = load_checkpoint(engine, folder_of(root, source, None), tensor_parallel=place(groups))
            checkpoints = folder_of(root, source, division).parent
            save_checkpoint(engine, checkpoints, state, extra_files={}, tensor_parallel=place(groups))
            if source == division or (source in FP32 and division in FP32):
                losses[source, division] = train(engine, groups, SAVED_STEP + 1, LAST_STEP)
    return losses


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    """All runs at once, in two sets of ranks for each size."""
    root = tmp_path_factory.mktemp("campaign")
    by_ranks = defaultdict(list)
    for division in DIVISIONS:
        by_ranks[division.ranks].append(division)
    reports, losses = {}, {}
    for (world_size, _), divisions in by_ranks.items():
        results = run_ranks(run_originals, world_size, divisions, root, timeout=200)
        reports |= {division: [result[division] for result in results] for division in divisions}
    for (world_size, _), divisions in by_ranks.items():
        losses |= run_ranks(resume_all, world_size, divisions, root, timeout=300)[0]
    return Campaign(root, reports, losses)


def joined_state(reports: list[Report], tensor_size: int) -> FullState:
    """The slices of the ranks of the first replica, put together; checks padding and what is not divided."""
    whole: FullState = {kind: {} for kind in KINDS}
    plain_shapes = {name: p.shape for name, p in MaskedLanguageModel(CONFIG).named_parameters()}
    for kind in KINDS:
        for name, shape in plain_shapes.items():
            parts = [report.state[kind][name] for report in reports[:tensor_size]]
            if name in reports[0].cut:
                joined = torch.cat(parts, reports[0].cut[name])
                assert not joined[shape[0] :].any(), f"the padding of {name} has become something"
                whole[kind][name] = joined[: shape[0]]
            else:
                assert all(torch.equal(part, parts[0]) for part in parts), f"the ranks' copies of {name} differ"
                whole[kind][name] = parts[0]
    return whole


@pytest.mark.full
@pytest.mark.parametrize("division", DIVISIONS, ids=lambda division: division.label)
def test_a_checkpoint_holds_the_slices_that_deepspeed_reports_put_together(campaign, division):
    reports = campaign.reports[division]
    assert bool(reports[0].cut) == (division.tensor_size > 1)
    reported = joined_state(reports, division.tensor_size)
    folder = folder_of(campaign.root, division, None)
    assert_bitwise_equal(full_state(folder), reported)
    weights = read_weights(folder)
    assert weights.keys() == reported["master"].keys()
    assert all(torch.equal(weights[name], weight) for name, weight in reported["master"].items())


@pytest.mark.full
@pytest.mark.parametrize("resumed_in", DIVISIONS, ids=lambda division: division.label)
@pytest.mark.parametrize("saved_in", DIVISIONS, ids=lambda division: division.label)
def test_saved_in_one_division_and_again_in_another_the_state_is_bitwise_equal(campaign, saved_in, resumed_in):
    original = full_state(folder_of(campaign.root, saved_in, None))
    assert_bitwise_equal(full_state(folder_of(campaign.root, saved_in, resumed_in)), original)


@pytest.mark.full
@pytest.mark.parametrize("division", DIVISIONS, ids=lambda division: division.label)
def test_resumed_in_its_own_division_a_run_is_bitwise_the_uninterrupted_one(campaign, division):
    assert campaign.losses[division, division] == campaign.reports[division][0].losses


@pytest.mark.full
@pytest.mark.parametrize("resumed_in", FP32, ids=lambda division: division.label)
@pytest.mark.parametrize("saved_in", FP32, ids=lambda division: division.label)
def test_resumed_in_another_division_the_losses_are_those_of_the_uninterrupted_run(campaign, saved_in, resumed_in):
    # Divisions sum in other orders, which float32 rounds differently: some 1e-7, and Adam passes it on.
    expected = pytest.approx(campaign.reports[saved_in][0].losses, rel=1e-5)
    assert campaign.losses[saved_in, resumed_in] == expected


def load_without_saying_the_place(checkpoints: Path) -> str:
    """What a caller hears who forgets `tensor_parallel`, in saving and in loading."""
    groups = join(2)
    engine = build_engine(Division(2, Layout(1, 1)), groups)
    with pytest.raises(RuntimeError) as saving:
        save_checkpoint(engine, checkpoints, {"step": 1}, extra_files={})
    folder = save_checkpoint(engine, checkpoints, {"step": 1}, extra_files={}, tensor_parallel=place(groups))
    with pytest.raises(RuntimeError) as loading:
        load_checkpoint(engine, folder)
    assert [path.name for path in checkpoints.iterdir()] == [folder.name]
    return f"{saving.value} {loading.value}"


def test_a_place_that_is_not_the_shards_is_a_fault_on_all_ranks(tmp_path):
    for told in run_ranks(load_without_saying_the_place, 2, tmp_path):
        assert told.count("embeddings.word.weight is Shard(dim=0, rank=1, size=2, logical_shape=(37, 16))") == 2
