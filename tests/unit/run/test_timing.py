"""Where a step's time goes."""

from __future__ import annotations

import time

import torch

from deberta_xl.run.timing import PHASES, StepTimer


def test_the_parts_of_a_step_are_never_more_than_the_step(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.0, 9.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = StepTimer(torch.device("cpu"))
    timer.begin_step(is_exact=True)
    with timer.phase("data"):
        pass
    with timer.phase("forward_backward"):
        pass
    split = timer.split()
    assert split == {
        "step_seconds": 9.0, "data_seconds": 0.5, "forward_backward_seconds": 5.0, "optimizer_seconds": 0.0,
    }  # fmt: skip
    assert sum(split[f"{phase}_seconds"] for phase in PHASES) <= split["step_seconds"]
