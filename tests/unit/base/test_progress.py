"""What long work shows of itself: on a terminal of any width, in a log, and to the process's heartbeat."""

from __future__ import annotations

import logging
import time

import pytest
from rich.cells import cell_len

from deberta_xl.base import progress as progress_module
from deberta_xl.base import signs
from deberta_xl.base.durations import duration
from deberta_xl.base.progress import Work, progress, tracked
from deberta_xl.base.screen import Pace, compose, screen
from deberta_xl.run.metrics import TrainingLine, described

VALUES = {"loss": 6.3513, "tokens_per_second": 4199.0, "accuracy": 0.081, "learning_rate": 9.3e-4, "grad_norm": 0.708}


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Ears:
    """Counts the signs that work gets on."""

    moves = 0

    def moved(self) -> None:
        """A unit is done."""
        self.moves += 1

    def waits(self) -> None:
        """Nothing to wait for."""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"), (3.21, "3.2 s"), (9.96, "10 s"), (61, "61 s"), (119.6, "2 min 00 s"), (725, "12 min 05 s"),
        (7500, "2 h 05 min"), (86_399.9, "1 d 0 h"), (3 * 86_400 + 4 * 3600, "3 d 4 h"), (1e12, "11,574,074 d 1 h"),
        (float("inf"), "unknown"), (float("nan"), "unknown"),
    ],
)  # fmt: skip
def test_durations_read_as_people_say_them(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("width", [200, 110, 79, 39])
def test_step_total_and_time_left_are_shown_on_a_terminal_of_any_width(monkeypatch, width):
    clock = Clock(monkeypatch)
    line = TrainingLine(999_000, 1_000_000)
    line.values = described(VALUES)
    clock.now += 90.0
    line.reach(999_001)
    text = compose(line, width)
    assert text.startswith("step 999,001/1,000,000")
    assert "1 d 0 h left" in text
    assert len(text) <= width
    assert ("grad norm 0.708" in text) == (width >= 110)
    assert ("━" in text) == (width == 200)
    assert compose(line, 10) == "step 999,0"
    compose(line, 200, is_plain=True).encode("ascii")


def test_a_long_path_in_any_script_never_pushes_the_time_left_off_the_screen(monkeypatch):
    clock = Clock(monkeypatch)
    for path in ("/shared/projects/encoders/tasks/GLUE/SST-2, train", "/共有/データ/日本語の文書/感情分析, train"):
        work = Work(f"tokenising {path}", 100, "examples")
        clock.now += 61.0
        work.done = 50
        work.pace.reach(50)
        text = compose(work, 39)
        assert text.endswith(", train 50%  61 s left")
        assert cell_len(text) <= 39
        compose(work, 39, is_plain=True)


def test_only_this_starts_steps_count_for_the_time_left_however_long_ago_the_last_one_was(monkeypatch):
    clock = Clock(monkeypatch)
    line = TrainingLine(500, 600)
    assert line.left() == ""
    clock.now += 50.0  # the first step is slow: it warms up
    line.reach(501)
    assert line.left().endswith(" left")
    for step in range(502, 551):
        clock.now += 40.0
        line.reach(step)
    assert line.left() == f"{duration(50 * 40)} left"
    clock.now += 3600.0  # an evaluation
    assert line.left() == f"{duration(49 * 40)} left"


def test_the_pace_follows_the_later_half_of_the_work_and_remembers_little(monkeypatch):
    clock = Clock(monkeypatch)
    pace = Pace()
    for done in range(1, 2001):
        clock.now += 1.0 if done < 900 else 3.0
        pace.reach(done)
    assert pace.seconds_left(3000) == pytest.approx(3000.0)
    assert len(pace.times) <= 64


def test_a_rank_that_works_long_is_heard_by_its_heartbeat_at_every_unit_and_shows_nothing_when_it_is_short(capsys):
    ears = Ears()
    signs.listen(ears)
    assert list(tracked(iter("abc"), "evaluating", 3, "batches")) == ["a", "b", "c"]
    signs.listen(None)
    assert ears.moves == 3
    assert capsys.readouterr().err == ""


def test_other_ranks_show_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "current_rank", lambda: 1)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    with progress("evaluating", 2) as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_lines_in_a_log_come_further_and_further_apart_and_name_the_time_left(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with progress("evaluating", 10_000, "batches") as advance:
        for _ in range(5000):
            clock.now += 1.0
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating: 0% 10/10,000 batches, 2 h 46 min left"
    assert 10 < len(lines) < 40


def test_in_a_run_the_lines_go_to_its_log(monkeypatch, caplog):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(logging.getLogger("deberta_xl"), "propagate", True)
    signs.listen(Ears())
    with caplog.at_level(logging.INFO), progress("saving step 3", 2) as advance:
        advance()
    signs.listen(None)
    assert "saving step 3: 50%" in caplog.text


def test_work_of_unknown_length_is_counted():
    work = Work("reading", 0, "lines")
    work.done = 5000
    assert compose(work, 60).startswith("reading")
    assert "5,000 lines" in compose(work, 60)


def test_a_terminal_shows_long_work_and_is_left_clean(monkeypatch, capfd):
    monkeypatch.setattr(type(screen), "is_there", lambda self: True)
    monkeypatch.setattr(progress_module, "SHOWN_AFTER_SECONDS", 0.0)
    with progress("evaluating", 2, "batches") as advance:
        advance()
        assert [work.description for work in screen.lines] == ["evaluating"]
        with progress("saving", 2) as inner:
            inner()
            assert len(screen.lines) == 2
    assert screen.lines == []
    assert screen.live is None
