"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from deberta_xl.settings.pretraining import ScheduleSection


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: ScheduleSection) -> float:
    """The rate of update number `step`, 1 … `total_steps`: linear warm-up to `peak`, then the schedule's decay.

    The decay ends at `final_ratio` of the peak one update after the last, so that no update is wasted on a rate of 0.
    """
    done = step - 1
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    progress = (done - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    remaining = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "constant": 1.0,
    }[schedule.decay]
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * remaining)
