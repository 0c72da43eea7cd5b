"""What DeepSpeed gets wrong about a divided model without a word, when it is not told enough; and that it is told.

The other traps of this kind have their tests elsewhere: stage 0 and keys that nobody reads are refused
(tests/unit/settings/test_deepspeed_config.py); norms on slices (test_sequence_parallel.py); a layer applied twice and
recomputed under ZeRO 2 and 3 (test_training_equality.py); gradients of the shared word table (test_pipeline.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Case, Layout, Run, recorded
from plain_run import LENGTH, ROWS, Curve, architecture, train_plainly
from ranks import RankError, run_ranks
from small_dataset import SmallDataset

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.shard import shard_of
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig
from deberta_xl.training import start

STEPS = 4
NOTICED = 1e-3
"""A hundred times what sums in another order make of float32."""


@pytest.fixture(scope="module")
def plain(small_dataset: SmallDataset) -> Curve:
    """The reference run: one process, nothing divided."""
    return train_plainly(small_dataset, architecture(small_dataset.tokenizer.vocab_size), STEPS)[0]


def train(dataset: SmallDataset, folder: Path, sabotage: str) -> Curve:
    """A run over two ranks that share the model, which keeps something from DeepSpeed."""
    if "groups" in sabotage:
        Groups.model_parallel_unit = lambda self: None
    if sabotage == "groups and batch":
        DeepSpeedConfig.engine_dict = without_batch(DeepSpeedConfig.engine_dict)
    if sabotage == "marks":
        start.divide = divide_without_marks
    run = start_run(dataset, folder, Layout(pipeline=2) if sabotage == "copies" else Layout(tensor=2))
    if sabotage == "copies":
        for parameter in run.engine.module.parameters():
            parameter.ds_pipe_replicated = False
    # What two of these would save at their end does not cover the model once, and is refused.
    with recorded(lambda: None) as curve, contextlib.suppress(CheckpointError):
        run.training.train()
    return curve


def without_batch(engine_dict: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`engine_dict`, but DeepSpeed cannot check the batch's arithmetic."""
    return lambda *given: {key: value for key, value in engine_dict(*given).items() if key != "train_batch_size"}


def start_run(dataset: SmallDataset, folder: Path, layout: Layout) -> Run:
    """A run over the ranks of a layout, before its first step."""
    config = architecture(dataset.tokenizer.vocab_size)
    return Run(dataset, folder / "run", layout, Case(), config, STEPS)


def divide_without_marks(model: torch.nn.Module, groups: Groups, **options: object) -> None:
    """`divide`, but nothing tells DeepSpeed which parameters are slices."""
    divide(model, groups, **options)
    for parameter in model.parameters():
        parameter.tensor_model_parallel = False


def largest_difference(actual: list[float], expected: list[float]) -> float:
    """Relative, over the steps."""
    return max(abs(a - e) / e for a, e in zip(actual, expected, strict=True))


def test_an_engine_that_does_not_know_the_groups_is_refused_for_its_batch(small_dataset, tmp_path):
    with pytest.raises(RankError, match=r"train_batch_size is not equal .* 8 != 8 \* 1 \* 2"):
        run_ranks(train, 2, small_dataset, tmp_path, "groups")


def test_an_engine_that_knows_neither_groups_nor_batch_trains_something_else(small_dataset, plain, tmp_path):
    for curve in run_ranks(train, 2, small_dataset, tmp_path, "groups and batch"):
        # It takes the slices for copies of one weight: all ranks begin with the first one's.
        assert largest_difference(curve.losses, plain.losses) > NOTICED
        assert largest_difference(curve.norms, plain.norms) > NOTICED


def test_slices_that_are_not_marked_give_another_gradient_norm(small_dataset, plain, tmp_path):
    for curve in run_ranks(train, 2, small_dataset, tmp_path, "marks"):
        assert curve.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)  # the forward pass is right
        assert largest_difference(curve.norms, plain.norms) > NOTICED


def what_deepspeed_knows(dataset: SmallDataset, folder: Path) -> tuple[int, int, set[str], set[str]]:
    """Replicas and model-parallel ranks as the engine has them; slices by our mark, and by the one it reads."""
    run = start_run(dataset, folder, Layout(tensor=2, data=2))
    named = list(run.engine.module.named_parameters())
    ours = {name for name, p in named if shard_of(p) is not None}
    theirs = {name for name, p in named if getattr(p, "tensor_model_parallel", False)}
    return run.engine.dp_world_size, run.engine.mp_world_size, ours, theirs


def test_the_engine_is_told_the_groups_and_every_slice(small_dataset, tmp_path):
    for replicas, model_ranks, ours, theirs in run_ranks(what_deepspeed_knows, 4, small_dataset, tmp_path):
        assert (replicas, model_ranks) == (2, 2)
        assert ours == theirs
        # The bias is a parameter of ours, which megatron-core does not mark.
        assert {"head.bias", "embeddings.word.weight", "encoder.layers.0.feed_forward.down.weight"} < ours
        assert "encoder.layers.0.feed_forward.down.bias" not in ours


def test_a_word_table_counted_on_both_of_its_stages_gives_another_gradient_norm(small_dataset, plain, tmp_path):
    for curve in run_ranks(train, 2, small_dataset, tmp_path, "copies"):
        assert curve.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
        assert largest_difference(curve.norms, plain.norms) > NOTICED


def what_a_stage_sends(dataset: SmallDataset, folder: Path) -> tuple[torch.Size, bool, bool] | None:
    """Shape of what the first stage of three hands over, and whether it is one float tensor with a gradient."""
    run = start_run(dataset, folder, Layout(pipeline=3))
    sent = []
    run.engine.module.register_forward_hook(lambda _module, _inputs, output: sent.append(output))
    run.train()
    return None if run.grid.is_last_stage else (sent[0].shape, sent[0].is_floating_point(), sent[0].requires_grad)


def test_stages_exchange_one_float_tensor(small_dataset, tmp_path):
    # From three stages on DeepSpeed reuses receive buffers whatever their dtype: integers beside floats become garbage.
    first, second, last = run_ranks(what_a_stage_sends, 3, small_dataset, tmp_path)
    assert first == second == ((ROWS * LENGTH + 16, 32), True, True)
    assert last is None
