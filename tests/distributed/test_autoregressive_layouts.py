"""Causal, prefix and mixed training in every layout is what one process trains, written in plain PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from full_state import FullState
from layouts import Case, Layout, run_cases
from plain_run import LENGTH, ROWS, SEED, Curve, LossOf, architecture, assert_equal_curves, train_plainly
from ranks import run_ranks
from small_dataset import SmallDataset
from started import PRETRAIN, start
from test_layout_matrix import LAYOUTS, LOW_PRECISION, compare
from test_own_objective import STOPPED_AFTER, TINY, figures, weights
from torch import Tensor

from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.random_numbers import derive, uniform
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.objectives.autoregressive import KIND, draw_prefixes
from deberta_xl.objectives.rows import KeyedBatch, KeyedData
from deberta_xl.settings.deepspeed_config import SHIPPED_CONFIGS
from deberta_xl.settings.pretraining import DataSection
from deberta_xl.weights.native import find_weights_folder

SHARE = 0.5
MICRO = 2
"""Sequences that are of one kind in `mixed`, in all cases."""


class Kind:
    """The sum of a micro-batch's losses by its kind, and how many there are."""

    def __init__(self, batch: KeyedBatch, name: str):
        ids, segments, labels = map(torch.from_numpy, batch.rows)
        self.ids, self.segments, self.name = ids, segments, name
        if name == "masked":
            self.labels, self.open = labels, None
            return
        self.ids = torch.where(labels > 0, labels, ids)
        is_open = torch.from_numpy(draw_prefixes(batch.rows.segments, batch.key_B))
        self.open = is_open if name == "prefix" else torch.zeros_like(is_open)
        self.labels = torch.zeros_like(ids)
        for row, place in np.ndindex(len(ids), LENGTH - 2):
            is_together = segments[row, place + 1] == segments[row, place] > 0
            is_followed = segments[row, place + 2] > 0  # by more of the row, whose last token nothing predicts
            if is_together and is_followed and not self.open[row, place + 1]:
                self.labels[row, place] = self.ids[row, place + 1]

    @property
    def count(self) -> int:
        """Of labels."""
        return int((self.labels > 0).sum())

    def sum(self, model: MaskedLanguageModel) -> Tensor:
        """Of the cross-entropies."""
        return model(self.ids, self.segments, labels=self.labels, label_count=1.0, open_BS=self.open).loss


def kind_of(objective: str, batch: KeyedBatch) -> str:
    """By the objective; in `mixed` by the first row's key."""
    if objective != "mixed":
        return objective
    return "causal" if uniform(derive(batch.key_B[:1], KIND), np.zeros(1))[0] < SHARE else "masked"


def loss_of(kinds: list[Kind], model: MaskedLanguageModel) -> Tensor:
    """The mean over each kind's labels, weighed by how many micro-batches are of it."""
    total = torch.zeros(())
    for name in {kind.name for kind in kinds}:
        of_name = [kind for kind in kinds if kind.name == name]
        mean = sum(kind.sum(model) for kind in of_name) / sum(kind.count for kind in of_name)
        total = total + mean * len(of_name) / len(kinds)
    return total


def losses(objective: str, dataset: SmallDataset) -> Iterator[LossOf]:
    """Of every step."""
    data = KeyedData(PretrainingData(TokenStore(dataset.train), dataset.tokenizer, DataSection(), LENGTH, seed=SEED))
    for first in range(0, 10**6, ROWS):
        batches = [data.batch(start, MICRO) for start in range(first, first + ROWS, MICRO)]
        yield partial(loss_of, [Kind(batch, kind_of(objective, batch)) for batch in batches])


@pytest.fixture(scope="module")
def plain(small_dataset) -> Callable[[str], tuple[Curve, FullState]]:
    """The reference run of an objective; it learns something."""

    @cache
    def trained(objective: str) -> tuple[Curve, FullState]:
        config = architecture(small_dataset.tokenizer.vocab_size)
        curve, state = train_plainly(small_dataset, config, losses=partial(losses, objective))
        assert curve.losses[-1] < curve.losses[0] - 0.1
        return curve, state

    return trained


def case(objective: str, layout: Layout, **options: object) -> Case:
    """With micro-batches of MICRO sequences."""
    return Case(accumulation=ROWS // (layout.data * MICRO), objective=objective, **options)


EVERY_TIME = {
    "PP2xDP2": [{"objective": "mixed", "recompute": True}],
}
"""The rest is in the full matrix."""


@pytest.mark.parametrize("name", EVERY_TIME)
def test_a_layout_gives_the_plain_run(small_dataset, plain, tmp_path, name):
    for options in EVERY_TIME[name]:
        of_case = case(layout=LAYOUTS[name], **options)
        compare(small_dataset, tmp_path, LAYOUTS[name], [of_case], plain(of_case.objective))


MATRIX = [
    ("TP2", "causal"), ("TP2", "prefix"), ("TP2xDP2", "mixed"), ("PP2", "causal"), ("PP2xDP2", "mixed"),
    ("TP2xPP2", "prefix"), ("TP2xPP2", "mixed"), ("TP2xPP2xDP2", "mixed"),
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("name", "objective"), MATRIX)
def test_every_layout_and_stage_gives_the_plain_run(small_dataset, plain, tmp_path, name, objective):
    layout = LAYOUTS[name]
    stages = (1,) if layout.pipeline > 1 else (1, 2, 3)
    cuts = (False, True) if layout.tensor > 1 else (False,)
    cases = [
        case(objective, layout, stage=stage, sliced=cut, recompute=(stage + cut) % 2 == 0)
        for stage in stages for cut in cuts
    ]  # fmt: skip
    compare(small_dataset, tmp_path, layout, cases, plain(objective))


def words(dataset: SmallDataset, layout: str, run: str, objective: str) -> list[str]:
    """What the user types for a run with dropout."""
    _, engine, options = COMMAND_LAYOUTS[layout]
    settings = ["--config", "debug", "--deepspeed_config", str(SHIPPED_CONFIGS / f"{engine}.json"), *TINY, *options]
    return [
        *settings, f"data.train={dataset.train}", f"data.valid={dataset.valid}", f"run.folder={run}",
        f"train.objective={objective}",
    ]  # fmt: skip


def pretrain(folder: Path, given: list[str], layout: str, stop_after: int | None = None) -> None:
    """One start of it."""
    ended = start(PRETRAIN, given, COMMAND_LAYOUTS[layout][0], folder=folder, stop_after=stop_after)
    assert ended.returncode == 0, ended.stdout


COMMAND_LAYOUTS = {
    "plain": (1, "cpu_debug", []),
    "ZeRO-3": (2, "zero3_fp32", []),
    "TP2": (2, "cpu_debug", ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, "cpu_debug", ["parallel.pipeline_parallel_size=2"]),
}
RESUMED = [("plain", "mixed"), ("ZeRO-3", "mixed"), ("TP2", "prefix"), ("PP2", "mixed"), ("PP2", "causal")]


@pytest.mark.parametrize(
    ("layout", "objective"),
    [pytest.param(*case, marks=pytest.mark.full) if case[0] != "plain" else case for case in RESUMED],
)
def test_a_stopped_run_resumes_to_identical_figures_and_weights(small_dataset, tmp_path, layout, objective):
    whole, stopped = (words(small_dataset, layout, name, objective) for name in ("whole", "stopped"))
    pretrain(tmp_path, whole, layout)
    pretrain(tmp_path, stopped, layout, STOPPED_AFTER)
    assert (tmp_path / "stopped" / "STATE").read_text() == "stopped\n"
    pretrain(tmp_path, stopped, layout)
    logged = figures(tmp_path / "whole")
    assert figures(tmp_path / "stopped") == logged
    kinds = ["masked_", "causal_"] if objective == "mixed" else [""]
    for kind in kinds:
        assert all(math.isfinite(logged[6][f"valid_{kind}{name}"]) for name in ("loss", "accuracy"))
        assert any(f"{kind}loss" in logged[step] and f"{kind}accuracy" in logged[step] for step in logged)
    actual, expected = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    config = json.loads((find_weights_folder(tmp_path / "whole") / "config.json").read_text())
    assert config["objective"] == objective
    if layout != "plain":  # dropout's masks follow from the place in the global batch, draws from the samples
        pretrain(tmp_path, words(small_dataset, "plain", "plain", objective), "plain")
        for step, values in figures(tmp_path / "plain").items():
            assert logged[step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.full
@pytest.mark.parametrize("objective", ["causal", "mixed"])
def test_low_precision_follows_the_plain_run_within_its_rounding(small_dataset, plain, tmp_path, objective):
    loss, norm = LOW_PRECISION["bf16"]
    layout = LAYOUTS["TP2xPP2"]
    of_case = case(objective, layout, precision="bf16_fp32_sums_at_once")
    for (curve,) in run_ranks(
        run_cases, layout.world_size, small_dataset, tmp_path, layout, [of_case], {}, timeout=300
    ):
        assert_equal_curves(curve, plain(objective)[0], of_case, loss, norm)
