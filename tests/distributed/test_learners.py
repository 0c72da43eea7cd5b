"""An update of one learner leaves the other's weights, moments and counts alone, whatever engine holds them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import layouts
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from layouts import Case, Layout, Run
from plain_run import ROWS, Curve, architecture, assert_equal_curves
from ranks import run_ranks
from small_dataset import SmallDataset
from torch import Tensor

from deberta_xl.checkpoint.fragments import (
    adam_steps,
    canonical_parameters,
    create_adam_state,
    engine_fragments,
    fragment_values,
)
from deberta_xl.checkpoint.rank_file import KINDS
from deberta_xl.objectives.objective import Mean
from deberta_xl.training.engine import Turns
from deberta_xl.training.loop import Training
from deberta_xl.training.step import even_shares, micro_batch_keys

CASES = {
    "ZeRO-1": Case(1, 2),
    "ZeRO-2": Case(2, 2),
    "ZeRO-3": Case(3, 2),
    "bf16": Case(2, 2, precision="bf16"),
    "bf16 with float32 sums": Case(1, 2, precision="bf16_fp32_sums"),
    "bf16 with float32 sums at once": Case(1, 2, precision="bf16_fp32_sums_at_once"),
    "fp16": Case(2, 2, precision="fp16"),
    "ZeRO-3 offloaded": Case(3, 2, offload=True),
    "ZeRO-2 offloaded": Case(2, 2, offload=True),
    "without bias correction": Case(1, 2, bias_correction=False),
}
EVERY_TIME = ("ZeRO-3",)


def state(run: Run) -> dict[str, dict[str, Tensor]]:
    """Learner -> name and kind of every tensor of this rank's part of the state -> a copy."""
    create_adam_state(run.engine)
    found: dict[str, dict[str, Tensor]] = {"generator": {}, "discriminator": {}}
    fragments = engine_fragments(run.engine, canonical_parameters(run.engine))
    for kind in KINDS:
        for piece, values in fragment_values(run.engine, fragments, kind):
            found[piece.name.partition(".")[0]][f"{piece.name} {kind}"] = values.clone()
    return found


def is_alike(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether nothing has changed."""
    return all(torch.equal(before[name], after[name]) for name in before)


def update_in_turns(dataset: SmallDataset, folder: Path, case: Case) -> None:
    """Generator, discriminator, discriminator, generator."""
    case = case._replace(objective="replaced_tokens")
    words = ["optimizer.learning_rate=0"]
    run = Run(dataset, folder, Layout(data=2), case, architecture(dataset.tokenizer.vocab_size), 8, words)
    training, objective = run.training, run.training.objective
    training.begin()
    training.is_finite, training.left_out = True, []
    batches = next(objective.batches(1, 0, rank=run.grid.data_parallel_rank, size=2))
    shares = even_shares({"labels": 20, "tokens": 40 * ROWS}, len(batches), 2)
    keys = micro_batch_keys(1, 1, len(batches), run.grid)
    losses = {
        "generator": lambda model, batch, shares, key: {
            "loss": model("propose", **objective.given(batch, shares, key)).loss
        },
        "discriminator": lambda model, batch, shares, key: {
            "loss": objective.losses(model, batch, shares, key)["loss"]
        },
    }
    norms, steps = {}, {"generator": 0, "discriminator": 0}
    for learner in ("generator", "discriminator", "discriminator", "generator"):
        other = "generator" if learner == "discriminator" else "discriminator"
        before = state(run)
        with dropped_records() as dropped:
            training.update(losses[learner], batches, shares, keys, learner=learner, reports={"loss": Mean("labels")})
        assert dropped == []
        look_at_something(run)
        after = state(run)
        steps[learner] += 1
        assert is_alike(before[other], after[other]), f"{other} changed with {learner}"
        assert not is_alike(before[learner], after[learner]), f"{learner} did not change"
        assert adam_steps(run.engine) == steps
        norms.setdefault(learner, []).append(float(training.recorder.norms[f"{learner}_grad_norm"]))
    # At a rate of 0 only moments move, so a gradient comes again as it was, whatever the buffers held in between.
    for first, second in norms.values():
        assert second == pytest.approx(first, rel=1e-6)
    if case.stage == 3:
        check_gathering(run, dropped)
    for spoiled in ("generator", "discriminator"):
        parameter = next(p for name, p in run.engine.module.named_parameters() if name.startswith(spoiled))
        before, hook = state(run), parameter.register_hook(lambda gradient: gradient * float("nan"))
        training.update(losses[spoiled], batches, shares, keys, learner=spoiled, reports={"loss": Mean("labels")})
        hook.remove()
        after = state(run)
        assert is_alike(before["generator"], after["generator"])
        assert is_alike(before["discriminator"], after["discriminator"])
        assert adam_steps(run.engine) == steps
    assert (training.is_finite, training.left_out) == (False, ["generator", "discriminator"])
    training.heartbeat.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.full) for name in CASES]
)
def test_learners_take_turns(small_dataset, tmp_path, name):
    run_ranks(update_in_turns, 2, small_dataset, tmp_path / "run", CASES[name], timeout=120)


HELD = 20_000
"""Parameters that a rank may hold at a time, a fifth of them all."""
TURNS = {
    "accumulated": Case(3, 2, dropout=0.1),
    "recomputed": Case(3, recompute=True, dropout=0.1),
    "bf16": Case(3, precision="bf16"),
}


class Gathered(NamedTuple):
    """How a run under ZeRO-3 went on a rank."""

    curve: Curve
    weights: dict[str, Tensor]
    num_dropped: int
    """Records that were dropped, with inferences in between or without."""


def sparing(case: Case, made: Callable[[Case], dict]) -> dict:
    """The engine's settings as they are made, with little room for whole parameters."""
    settings = made(case)
    settings["zero_optimization"] |= {
        "stage3_max_live_parameters": HELD, "stage3_max_reuse_distance": 5000, "stage3_prefetch_bucket_size": 3000,
    }  # fmt: skip
    return settings


def look_at_something(run: Run) -> None:
    """An inference that nobody awaits: of the discriminator alone."""
    ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    run.engine.eval()
    with torch.no_grad():
        run.engine("judge", corrupted=ids, segments=torch.ones_like(ids))
    run.engine.train()


@contextlib.contextmanager
def dropped_records() -> Iterator[list[Coordinator]]:
    """The coordinators that drop their record, as they do it."""
    invalidate, found = Coordinator._invalidate_trace, []

    def noted(coordinator: Coordinator) -> None:
        found.append(coordinator)
        invalidate(coordinator)

    with mock.patch.object(Coordinator, "_invalidate_trace", noted):
        yield found


def check_gathering(run: Run, dropped: list[Coordinator]) -> None:
    """After two updates of each learner: both gather ahead, have never dropped a record, and hold nothing."""
    own = run.training.turns.coordinators
    assert {*own} == {"generator", "discriminator"}
    for learner, coordinator in own.items():
        assert coordinator.is_complete_trace(), learner
        assert coordinator not in dropped, learner
        assert coordinator._PartitionedParameterCoordinator__n_available_params == 0, learner
    assert run.engine.optimizer.parameter_offload.param_coordinator not in own.values()
    assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in run.engine.module.parameters())


def train_in_turns(dataset: SmallDataset, folder: Path, case: Case, has_own: bool) -> Gathered:
    """Four steps with evaluations; with `has_own`, a coordinator for each learner, and inferences in between."""
    case = case._replace(objective="replaced_tokens")
    words = [f"data.valid={dataset.valid}", "evaluation.interval=2", "evaluation.max_samples=4"]
    shared = mock.patch.object(Turns, "gathering_for", return_value=contextlib.nullcontext())

    def after_step() -> None:
        if has_own and run.training.state.step > 1:
            check_gathering(run, dropped)
            look_at_something(run)

    with (
        mock.patch.object(layouts, "engine_settings", partial(sparing, made=layouts.engine_settings)),
        dropped_records() as dropped,
        contextlib.nullcontext() if has_own else shared,
    ):
        run = Run(dataset, folder, Layout(data=2), case, architecture(dataset.tokenizer.vocab_size), 4, words)
        curve = run.train(after_step)
    weights = {name: tensor for of in state(run).values() for name, tensor in of.items()}
    return Gathered(curve, weights, len(dropped))


@pytest.mark.full
@pytest.mark.parametrize("name", TURNS)
def test_a_coordinator_for_each_learner_changes_no_number(small_dataset, tmp_path, name):
    own, shared = (
        run_ranks(train_in_turns, 2, small_dataset, tmp_path / folder, TURNS[name], has_own, timeout=300)
        for folder, has_own in (("own", True), ("shared", False))
    )
    for found, before in zip(own, shared, strict=True):
        assert found.curve == before.curve
        assert is_alike(before.weights, found.weights)
        assert before.num_dropped >= 4, "one a step, at least: what they are for"


class Half(NamedTuple):
    """How a run ended on a rank whose discriminator missed the update of step 2."""

    curve: Curve
    state: dict[str, Tensor]
    adam_steps: dict[str, int]
    left_out: dict[str, list[int]]


def miss_an_update(training: Training, *given: object, true_update: Callable, **named: object) -> object:
    """An update; the discriminator's of step 2 has a gradient that is not a number, on the last rank."""
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    with contextlib.ExitStack() as stack:
        if is_last and training.state.step == 1 and named["learner"] == "discriminator":
            parameter = next(training.engine.module.discriminator.parameters())
            stack.callback(parameter.register_hook(lambda gradient: gradient * float("nan")).remove)
        return true_update(training, *given, **named)


def train_half(dataset: SmallDataset, layout: Layout, case: Case, starts: list[tuple[Path, int]]) -> list[Half]:
    """Starts of runs to these steps, one after the other."""
    case = case._replace(objective="replaced_tokens")
    config = architecture(dataset.tokenizer.vocab_size, num_layers=2)
    true_update, ends = Training.update, []

    def update(*given: object, **named: object) -> object:
        return miss_an_update(*given, true_update=true_update, **named)

    with mock.patch.object(Training, "update", update):
        for folder, steps in starts:
            words = ["schedule.warmup_steps=2", "optimizer.epsilon=1e-3"]
            run = Run(dataset, folder, layout, case, config, steps, words)
            curve = run.train()
            tensors = {name: tensor for of in state(run).values() for name, tensor in of.items()}
            ends.append(Half(curve, tensors, adam_steps(run.engine), run.training.state.lately_left_out))
    return ends


@pytest.mark.full
def test_a_run_whose_learners_have_made_different_numbers_of_updates_resumes_bit_for_bit(small_dataset, tmp_path):
    starts = [(tmp_path / "whole", 5), (tmp_path / "stopped", 3), (tmp_path / "stopped", 5)]
    case = Case(2, 2, precision="fp16")
    for whole, stopped, resumed in run_ranks(train_half, 2, small_dataset, Layout(data=2), case, starts, timeout=300):
        assert whole.adam_steps == resumed.adam_steps == {"generator": 5, "discriminator": 4}
        assert whole.left_out == stopped.left_out == resumed.left_out == {"discriminator": [2]}
        assert resumed.curve == whole.curve.after(3)
        assert is_alike(whole.state, resumed.state)


@pytest.mark.full
def test_a_run_whose_learners_have_made_different_numbers_of_updates_resumes_in_another_layout(small_dataset, tmp_path):
    starts = [(tmp_path / "whole", 5), (tmp_path / "stopped", 3)]
    (whole, _), _ = run_ranks(train_half, 2, small_dataset, Layout(data=2), Case(3, 2), starts, timeout=300)
    ((resumed,),) = run_ranks(train_half, 1, small_dataset, Layout(), Case(1, 4), [(tmp_path / "stopped", 5)])
    assert resumed.adam_steps == whole.adam_steps == {"generator": 5, "discriminator": 4}
    assert_equal_curves(resumed.curve, whole.curve.after(3), "a run that goes on elsewhere")
