"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest

from deberta_xl.settings.pretraining import ScheduleSection
from deberta_xl.training.schedule import learning_rate


def rates(total: int = 10, **schedule: object) -> list[float]:
    """The rates of all updates, with a peak of 1."""
    section = ScheduleSection(**schedule)
    return [learning_rate(step, peak=1.0, total_steps=total, schedule=section) for step in range(1, total + 1)]


def test_warm_up_rises_evenly_from_the_first_update_to_the_peak():
    assert rates(warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_linear_decay_starts_at_the_peak_and_would_reach_the_end_one_update_after_the_last():
    assert rates(total=5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(total=5, final_ratio=0.5) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_cosine_decay_is_half_way_down_in_the_middle():
    assert rates(total=4, decay="cosine")[2] == pytest.approx(0.5)


def test_a_constant_rate_stays_at_the_peak():
    assert rates(warmup_steps=2, decay="constant")[1:] == [1.0] * 9


def test_a_run_that_only_warms_up_ends_at_the_peak():
    assert rates(total=3, warmup_steps=3)[-1] == 1.0
