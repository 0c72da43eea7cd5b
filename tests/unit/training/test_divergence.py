"""What a run does that has no finite values any more, or whose loss explodes: what is counted, kept, said and ended."""

from __future__ import annotations

import functools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from deberta_xl.base.errors import Diverged, HopelessRunError
from deberta_xl.commands import training_command
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.tasks.metrics import is_better
from deberta_xl.training.divergence import Explosion, SkippedSteps
from deberta_xl.training.safeguard import PATIENCE, Safeguard
from deberta_xl.training.state import WINDOW, TrainState

by_accuracy = functools.partial(is_better, "accuracy")


def make_checkpoint(checkpoints: Path, step: int) -> Path:
    """A folder with a checkpoint's name."""
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    return folder


def steps_left(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.iterdir())


def walk(state: TrainState, safeguard: Safeguard, finite: list[bool]) -> int:
    """Make these steps; the one at which the run was ended, 0 if it was not."""
    for is_finite in finite:
        state.advance(8, is_finite=is_finite)
        try:
            safeguard.after_step()
        except Diverged:
            return state.step
    return 0


@pytest.mark.parametrize(
    ("is_finite", "ended"),
    [
        (lambda step: step < 10, 9 + PATIENCE),  # for ever
        (lambda step: step % 2 == 0, 2 * PATIENCE - 1),  # every second step
        (lambda step: step % PATIENCE == 0, PATIENCE + 1),  # 29 of 30
        (lambda step: step % 3 > 0, 3 * PATIENCE),
        (lambda step: step % 10 > 0, 0),  # now and then
        (lambda step: step > 17, 0),  # fp16 looks for its loss scale
        (lambda step: step % 200 > PATIENCE - 2, 0),  # finds back, each time
    ],
)
def test_a_run_ends_after_thirty_steps_of_the_last_hundred_without_finite_gradient(tmp_path, is_finite, ended):
    state = TrainState()
    safeguard = Safeguard(state, None, tmp_path, keep=3)
    assert walk(state, safeguard, [is_finite(step) for step in range(1, 4 * WINDOW)]) == ended


def test_skipped_steps_are_part_of_the_state_and_counted_on_by_the_next_start(tmp_path):
    state = TrainState()
    assert walk(state, Safeguard(state, None, tmp_path, 3), [True] * 5 + [False] * (PATIENCE - 1) + [True]) == 0
    saved = json.loads(json.dumps(vars(state)))
    assert saved["skipped_steps"] == PATIENCE - 1
    state = TrainState(**saved)
    assert walk(state, Safeguard(state, None, tmp_path, 3), [False]) == state.step


def test_whose_updates_were_left_out_is_told_and_forgotten_after_the_last_hundred_steps(tmp_path, caplog):
    state, told = TrainState(), SkippedSteps(TrainState())
    state.advance(8, is_finite=False, left_out=["generator"])
    state.advance(8, is_finite=False, left_out=["generator", "discriminator"])
    told.tell(state, 2)
    assert "the gradient of the discriminator (once) and the generator (2 times) was not finite in 2" in caplog.text
    state = TrainState(**json.loads(json.dumps(vars(state))))
    safeguard = Safeguard(state, None, tmp_path, 3)
    for _ in range(PATIENCE - 2):
        state.advance(8, is_finite=False, left_out=["discriminator"])
    with pytest.raises(Diverged, match=r"of the discriminator \(29 times\) and the generator \(2 times\) were not"):
        safeguard.after_step()
    assert state.whose(since=state.step - 1) == " of the discriminator (once)"
    walk(state, safeguard, [True] * WINDOW)
    assert (state.whose(), state.lately_left_out) == ("", {})


def test_a_state_of_before_skipped_steps_were_counted_is_read():
    state = TrainState(**{"step": 5, "consumed_samples": 40, "best_step": 3, "best_value": 0.5, "num_waited": 1})
    assert (state.skipped_steps, state.lately_skipped, state.is_finite) == (0, [], True)


def test_a_checkpoint_outdates_others_only_once_an_update_of_its_weights_was_finite(tmp_path):
    make_checkpoint(tmp_path, 5)
    state = TrainState(step=10)
    safeguard = Safeguard(state, None, tmp_path, keep=1)
    safeguard.saved(make_checkpoint(tmp_path, 10))
    walk(state, safeguard, [False, False])
    assert steps_left(tmp_path) == [5, 10]
    walk(state, safeguard, [True])
    assert steps_left(tmp_path) == [10]


def test_the_best_checkpoint_of_a_fine_tuning_run_is_spared(tmp_path):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    state = TrainState(step=6, best_step=2)
    safeguard = Safeguard(state, tmp_path / "step-00000006", tmp_path, keep=1)
    walk(state, safeguard, [True])
    assert steps_left(tmp_path) == [2, 6]


def test_nothing_is_saved_and_no_run_is_done_after_a_step_without_finite_gradient(tmp_path):
    state = TrainState(step=19)
    safeguard = Safeguard(state, None, tmp_path, keep=1)
    walk(state, safeguard, [False])
    assert not safeguard.may_save()
    with pytest.raises(Diverged, match=r"not finite in the run's last step, 20 \(and in 1 of the last 20\)"):
        safeguard.check_end(searches_scale=False)
    walk(state, safeguard, [True])
    assert safeguard.may_save()
    safeguard.check_end(searches_scale=False)


def test_a_search_for_the_loss_scale_in_the_last_step_is_no_divergence_and_two_in_a_row_are(tmp_path):
    state = TrainState(step=19)
    safeguard = Safeguard(state, None, tmp_path, keep=1)
    walk(state, safeguard, [False])
    safeguard.check_end(searches_scale=True)
    assert safeguard.may_save()
    assert state.skipped_steps == 1
    walk(state, safeguard, [False, False])
    with pytest.raises(Diverged):
        safeguard.check_end(searches_scale=True)


def test_the_way_out_names_the_last_good_checkpoint_and_what_stands_in_its_way(tmp_path):
    checkpoints, state = tmp_path / "checkpoints", TrainState()
    safeguard = Safeguard(state, None, checkpoints, keep=0)
    assert safeguard.way_out().startswith("Nothing was saved: start again with a lower optimizer.learning_rate")
    state.step = 5
    safeguard.saved(make_checkpoint(checkpoints, 5))
    walk(state, safeguard, [False])
    assert f"step-00000005, the only one, never gave a finite gradient. Delete {tmp_path}, or" in safeguard.way_out()
    walk(state, safeguard, [True])
    assert safeguard.way_out().startswith(
        f"The last good checkpoint is {checkpoints}/step-00000005. Start the same command with a lower"
    )
    safeguard.saved(make_checkpoint(checkpoints, 7))
    walk(state, safeguard, [False])
    assert safeguard.way_out().startswith(
        f"The last good checkpoint is {checkpoints}/step-00000005. Delete {checkpoints}/step-00000007, whose weights"
    )


class Left(BaseException):
    """The process would have ended with a status."""


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (Diverged("nothing is finite"), "diverged", "nothing is finite. Nothing was saved: start again with a lower"),
        (HopelessRunError("no labels"), "running", "no labels"),
    ],
)
def test_a_hopeless_run_says_so_and_ends_with_the_status_that_slurm_does_not_requeue(
    tmp_path, monkeypatch, caplog, error, state, words
):
    def leave(status: int) -> None:
        raise Left(status)

    def train() -> None:
        raise error

    folder = RunFolder(tmp_path)
    beats: list[tuple[int, str]] = []
    heartbeat = SimpleNamespace(step=3, phase="optimizer", mark=lambda *beat: beats.append(beat), close=lambda: None)
    safeguard = Safeguard(TrainState(step=3), None, folder.checkpoints, keep=1)
    run = SimpleNamespace(
        folder=folder, train=train, heartbeat=heartbeat, safeguard=safeguard, state=safeguard.state
    )  # fmt: skip
    monkeypatch.setattr(training_command, "leave", leave)
    with pytest.raises(Left) as left:
        training_command.train_and_report(lambda: run)
    assert left.value.args == (training_command.REFUSED,)
    assert folder.state_file.read_text() == f"{state}\n"
    assert beats == [(3, "stopped")]
    assert caplog.messages[-1].startswith(f"step 3, phase optimizer: {words}")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_a_metric_that_is_no_number_never_chooses_weights_and_any_number_beats_it(metric, value):
    assert not is_better(metric, value, 0.1)
    assert is_better(metric, 0.1, value)


def test_weights_that_may_not_be_saved_are_not_the_best():
    state = TrainState()
    state.advance(8, is_finite=False)
    assert not state.take(0.9, by_accuracy)
    state.advance(8)
    assert state.take(0.8, by_accuracy)
    assert (state.best_step, state.best_value) == (2, 0.8)


def test_a_loss_that_explodes_to_finite_values_is_warned_of_once_with_numbers(caplog):
    explosion = Explosion(math.log(32_000))
    with caplog.at_level(logging.WARNING, "deberta_xl"):
        for step, loss in enumerate([10.5, *(8 - n / 10 for n in range(60)), 2.3, 2.6, math.nan, 2.2]):
            explosion.check(step, loss)
        assert caplog.messages == []
        for step in range(100, 200):
            explosion.check(step, 11.0)
    (told,) = caplog.messages
    assert told.startswith("step 101: the loss has risen to 4.")
    assert "and knowing nothing gives 10.37" in told
