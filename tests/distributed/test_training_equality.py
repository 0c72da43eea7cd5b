"""Training on DeepSpeed, under every ZeRO stage, equals a plain loop with torch's AdamW on one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from ranks import run_ranks
from small_dataset import SmallDataset
from torch.distributed import get_world_size

from deberta_xl.architecture import DebertaConfig
from deberta_xl.config import DataSection, OptimizerSection, RunConfig, TrainSection
from deberta_xl.config_file import load_run_config
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.deepspeed_config import SHIPPED_CONFIGS, load_deepspeed_config
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.objectives.masked_evaluation import evaluate_masked_lm
from deberta_xl.objectives.masked_lm import MaskedLM
from deberta_xl.objectives.objective import Evaluator
from deberta_xl.objectives.rows import MaskedRows, step_batches
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.parallel.plan import divide
from deberta_xl.training.engine import build_engine, gradient_norm, set_learning_rate
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.optimizer import build_optimizer
from deberta_xl.training.ownership import Ownership
from deberta_xl.training.step import even_shares, micro_batch_keys, run_step
from deberta_xl.training.timing import StepTimer

STEPS, ROWS, LENGTH = 20, 8, 48
PEAK = 2e-3
# float32: the same sums in another order, over 20 steps of Adam.
RELATIVE = 1e-5


class Curve(NamedTuple):
    """What two ways of training are compared by."""

    losses: list[float]
    norms: list[float]


class Case(NamedTuple):
    """One way to train."""

    stage: int
    accumulation: int
    activation_checkpointing: bool = False
    num_silent_rows: int = 0
    """Rows at the start of each global batch that have no labels at all."""
    bias_correction: bool = True
    """False for the original's form of Adam."""

    @property
    def optimizer(self) -> OptimizerSection:
        """The optimizer's settings."""
        return OptimizerSection(learning_rate=PEAK, bias_correction=self.bias_correction)


def architecture(vocab_size: int) -> DebertaConfig:
    """Two layers with everything: convolution, buckets, shared projections; dropout off."""
    return DebertaConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, position_buckets=8,
        max_position_embeddings=LENGTH, conv_kernel_size=3, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def rate(step: int) -> float:
    """Some schedule that changes at every step."""
    return PEAK * min(step / 5, 1.0)


def open_data(dataset: SmallDataset) -> PretrainingData:
    """The training rows."""
    return PretrainingData(TokenStore(dataset.train), dataset.tokenizer, DataSection(), LENGTH, seed=5)


def silence(batch: MaskedRows, first_row: int, num_silent_rows: int) -> MaskedRows:
    """Take away the labels of rows below `num_silent_rows` of the global batch."""
    num_slots = batch.labelled.position_BM.shape[1]
    is_kept = batch.labelled.slot_L // num_slots + first_row >= num_silent_rows
    labelled = batch.labelled._replace(slot_L=batch.labelled.slot_L[is_kept], label_L=batch.labelled.label_L[is_kept])
    return batch._replace(labelled=labelled)


def train_plainly(dataset: SmallDataset, case: Case) -> Curve:
    """The reference: one process, one forward per step, a plain optimizer and torch's clipping."""
    model = MaskedLanguageModel(architecture(dataset.tokenizer.vocab_size), seed=3)
    optimizer = build_optimizer(model, case.optimizer)
    train = TrainSection(global_batch_size=ROWS, micro_batch_size=ROWS)
    batches = step_batches(open_data(dataset), train, 0, MaskedRows.of, rank=0, size=1)
    curve = Curve([], [])
    for step in range(1, STEPS + 1):
        batch = silence(next(batches)[0], 0, case.num_silent_rows)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        loss = model(batch.input_ids_BS, batch.segments_BS, labels=batch.labelled).loss
        loss.backward()
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        curve.losses.append(loss.item())
    return curve


def settings(case: Case, micro_batch_size: int) -> dict:
    """DeepSpeed's configuration of a case."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        # Below the size of our tensors: nothing stays unpartitioned, and reductions come in several buckets.
        "zero_optimization": {
            "stage": case.stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 10_000,
        },
    }


def shipped_settings(name: str, case: Case, micro_batch_size: int) -> dict:
    """What a run hands to DeepSpeed with `deepspeed_configs/NAME.json`."""
    batch = [f"train.global_batch_size={ROWS}", f"train.micro_batch_size={micro_batch_size}"]
    run = load_run_config("debug", batch)
    data_parallel_size = ROWS // (micro_batch_size * case.accumulation)
    return load_deepspeed_config(SHIPPED_CONFIGS / f"{name}.json", run).engine_dict(data_parallel_size, run)


def train_as_shipped(dataset: SmallDataset, folder: str, name: str, tensor_parallel_size: int) -> Curve:
    """A run in low precision on this rank, accumulating, under a configuration of `deepspeed_configs/`."""
    get_accelerator().is_fp16_supported = lambda: True  # the CPU can, slowly; DeepSpeed asks for hardware support
    groups = build_groups(Grid.of(torch.distributed.get_rank(), get_world_size(), tensor_parallel_size))
    return train_with_engine(dataset, folder, Case(0, 2), partial(shipped_settings, name), groups)


def evaluate_under_zero_3(dataset: SmallDataset, max_samples: int) -> tuple[float, ...]:
    """Loss, accuracy, labels and unigram of an untrained model whose every parameter is cut up over the ranks."""
    case = Case(stage=3, accumulation=1)
    model = MaskedLanguageModel(architecture(dataset.tokenizer.vocab_size), seed=3)
    engine = build_engine(model, case.optimizer, settings(case, 4))
    engine.eval()
    valid = PretrainingData(TokenStore(dataset.valid), dataset.tokenizer, DataSection(), LENGTH, seed=5)
    rank, size = torch.distributed.get_rank(), get_world_size()
    result = evaluate_masked_lm(
        Evaluator(model=engine, device=engine.device, rank=rank, size=size), valid,
        vocab_size=dataset.tokenizer.vocab_size, max_samples=max_samples, micro_batch_size=4,
        log_unigram=open_data(dataset).log_unigram,
    )  # fmt: skip
    return result.loss, result.accuracy, result.num_labels, result.unigram_entropy


def train_with_engine(
    dataset: SmallDataset,
    folder: Path,
    case: Case,
    build_settings: Callable[[Case, int], dict] = settings,
    groups: Groups | None = None,
) -> Curve:
    """The same run on this rank of an engine, over a plain model or one divided over `groups`."""
    groups = groups or Groups(Grid.of(torch.distributed.get_rank(), get_world_size(), 1))
    rank, size = groups.grid.data_parallel_rank, groups.grid.data_parallel_size
    micro = ROWS // (size * case.accumulation)
    model = MaskedLanguageModel(architecture(dataset.tokenizer.vocab_size), seed=3)
    if case.activation_checkpointing:
        model.checkpoint_activations()
    divide(model, groups)
    engine = build_engine(model, case.optimizer, build_settings(case, micro), groups)
    train = TrainSection(global_batch_size=ROWS, micro_batch_size=micro)
    batches = step_batches(open_data(dataset), train, 0, MaskedRows.of, rank=rank, size=size)
    ownership = Ownership(folder / "OWNER", "nobody else")
    heartbeat, timer = Heartbeat(folder, torch.distributed.get_rank(), ownership), StepTimer(engine.device)
    objective = MaskedLM(RunConfig(), model.config, dataset.tokenizer, open_data(dataset), None)
    curve = Curve([], [])
    for step in range(1, STEPS + 1):
        micro_batches = [
            silence(batch, (number * size + rank) * micro, case.num_silent_rows)
            for number, batch in enumerate(next(batches))
        ]
        num_labels = torch.tensor(sum(b.counts[0] for b in micro_batches))
        torch.distributed.all_reduce(num_labels, group=groups.data_group)
        set_learning_rate(engine, rate(step))
        shares = even_shares({"labels": int(num_labels)}, len(micro_batches), size)
        keys = micro_batch_keys(0, step, len(micro_batches), groups.grid)
        result = run_step(
            engine, objective.losses, micro_batches, shares, keys, reports=objective.reports, heartbeat=heartbeat,
            timer=timer,
        )  # fmt: skip
        torch.distributed.all_reduce(result["loss"], group=groups.data_group)
        curve.losses.append(result["loss"].item() / size)
        curve.norms.append(gradient_norm(engine))
    heartbeat.close()
    return curve


def train_cases(dataset: SmallDataset, folder, cases: list[Case]) -> list[Curve]:
    """Every case on this rank, one after the other."""
    return [train_with_engine(dataset, folder, case) for case in cases]


def assert_equal_curves(actual: Curve, expected: Curve, what: object, relative: float = RELATIVE) -> None:
    """Losses and gradient norms of every step agree."""
    for name in Curve._fields:
        torch.testing.assert_close(
            torch.tensor(getattr(actual, name)), torch.tensor(getattr(expected, name)), rtol=relative, atol=0,
            msg=lambda text, name=name: f"{name} of {what}: {text}",
        )  # fmt: skip


@pytest.fixture(scope="module")
def plain_curve(small_dataset: SmallDataset) -> Curve:
    """The reference run; it must learn something, or its equality with anything would say little."""
    curve = train_plainly(small_dataset, Case(stage=0, accumulation=1))
    assert curve.losses[-1] < curve.losses[0] - 0.3
    return curve


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_and_accumulation_gives_the_plain_run(small_dataset, plain_curve, tmp_path, world_size):
    cases = [Case(stage, accumulation) for stage in (1, 2, 3) for accumulation in (1, 4)]
    for rank, curves in enumerate(run_ranks(train_cases, world_size, small_dataset, tmp_path, cases, timeout=300)):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, plain_curve, f"{case}, rank {rank} of {world_size}")


def test_recomputing_activations_gives_the_plain_run(small_dataset, plain_curve, tmp_path):
    cases = [Case(stage, 2, activation_checkpointing=True) for stage in (1, 2, 3)]
    for curves in run_ranks(train_cases, 2, small_dataset, tmp_path, cases, timeout=300):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, plain_curve, case)


def test_the_loss_is_the_global_mean_when_ranks_hold_different_numbers_of_labels(small_dataset, tmp_path):
    # Rows 0 to 4 have no labels: with 2 ranks and no accumulation rank 0 has none at all, rank 1 those of 3 rows.
    cases = [Case(1, 1, num_silent_rows=5), Case(3, 2, num_silent_rows=5)]
    expected = train_plainly(small_dataset, cases[0])
    for curves in run_ranks(train_cases, 2, small_dataset, tmp_path, cases, timeout=300):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, expected, case)


def test_the_originals_adam_gives_its_plain_run(small_dataset, tmp_path):
    # Without bias correction the first updates are about 1/sqrt(1 - 0.999) = 30 times smaller: another curve.
    cases = [Case(stage, 1, bias_correction=False) for stage in (1, 3)]
    expected = train_plainly(small_dataset, cases[0])
    for curves in run_ranks(train_cases, 2, small_dataset, tmp_path, cases, timeout=300):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, expected, case)


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload", "fp16"])
@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_every_shipped_low_precision_configuration_follows_the_plain_run(
    small_dataset, plain_curve, tmp_path, name, tensor_parallel_size
):
    # bf16 keeps 8 bits: a relative 2^-8 = 4e-3 per rounding, which is what norms may differ by (measured: 4e-3). Losses
    # average over many roundings (measured: 2e-4). fp16 keeps 11 bits.
    for curve in run_ranks(train_as_shipped, 2, small_dataset, tmp_path, name, tensor_parallel_size, timeout=300):
        torch.testing.assert_close(torch.tensor(curve.losses), torch.tensor(plain_curve.losses), rtol=1e-3, atol=0)
        torch.testing.assert_close(torch.tensor(curve.norms), torch.tensor(plain_curve.norms), rtol=2e-2, atol=0)


@pytest.mark.parametrize("max_samples", [1, 5])
def test_evaluation_under_zero_3_counts_every_row_once_when_ranks_run_out_of_rows(small_dataset, max_samples):
    (alone,) = run_ranks(evaluate_under_zero_3, 1, small_dataset, max_samples)
    for rank in run_ranks(evaluate_under_zero_3, 2, small_dataset, max_samples):
        assert rank == pytest.approx(alone, rel=1e-6)
