"""A run whose rows grow longer: through the changes of length, stopped at one and between two, on several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from full_state import assert_bitwise_equal, full_state
from small_dataset import SmallDataset
from test_pretrain_command import metrics, pretrain

GROWING = (
    "train.lengths=12:0.3,24:0.3", "train.steps=7", "checkpoint.interval=1", "checkpoint.keep=0",
    "evaluation.interval=3", "evaluation.max_samples=4", "train.global_batch_size=4", "train.micro_batch_size=1",
)  # fmt: skip
"""Two steps of 12 tokens in a row, two of 24, three of 48."""
LENGTHS = [12, 12, 24, 24, 48, 48, 48]
PAIR = "train.objective=replaced_tokens"
STAGES = "parallel.pipeline_parallel_size=2"
SLICES = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of all steps."""
    return [folder / "checkpoints" / f"step-{step:08d}" for step in range(1, len(LENGTHS) + 1)]


@pytest.mark.parametrize(
    ("words", "engine", "stops"),
    [
        pytest.param((), "cpu_debug", (2,), id="masked_lm"),
        pytest.param((PAIR,), "zero3_fp32", (1, 3), id="replaced_tokens", marks=pytest.mark.full),
        pytest.param(("train.objective=mixed", STAGES), "cpu_debug", (1,), id="in stages", marks=pytest.mark.full),
    ],
)
def test_a_run_stopped_at_a_change_of_length_or_between_two_ends_as_one_that_is_not(
    words: tuple[str, ...], engine: str, stops: tuple[int, ...], small_dataset: SmallDataset, tmp_path: Path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = pretrain(small_dataset, whole, *GROWING, *words, engine=engine, num_ranks=2)
    assert "rows: steps 1 … 2 of 16 x 12 tokens; steps 3 … 4 of 8 x 24 tokens; steps 5 … 7 of 4 x 48 tokens" in said
    for stop_after in (*stops, None):  # the step after that one was agreed on by then
        pretrain(small_dataset, parts, *GROWING, *words, engine=engine, num_ranks=2, stop_after=stop_after)
    for ended, expected, length in zip(step_folders(parts), step_folders(whole), LENGTHS, strict=True):
        assert_bitwise_equal(full_state(ended), full_state(expected))
        assert json.loads((ended / "config.json").read_text())["sequence_length"] == length
    assert metrics(parts, "loss") == metrics(whole, "loss")
    assert metrics(whole, "consumed_tokens") == {step: step * 4 * 48 for step in range(1, 8)}
    assert [*metrics(whole, "valid_loss")] == [3, 6, 7]


@pytest.mark.full
@pytest.mark.parametrize("layout", [(STAGES,), SLICES], ids=["stages", "slices"])
def test_a_layout_gives_the_run_of_one_rank(layout: tuple[str, ...], small_dataset: SmallDataset, tmp_path: Path):
    for name, words, num_ranks in (("plain", (), 1), ("divided", layout, 2)):
        pretrain(small_dataset, tmp_path / name, *GROWING, *words, num_ranks=num_ranks)
    for figure in ("loss", "grad_norm", "valid_loss"):
        assert metrics(tmp_path / "divided", figure) == pytest.approx(metrics(tmp_path / "plain", figure), rel=1e-4)
