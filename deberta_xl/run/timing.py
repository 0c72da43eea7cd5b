"""Where a step's time goes: waiting for data, forward and backward, optimizer; and what there is besides."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward_backward", "optimizer")


class StepTimer:
    """Sums seconds per phase between two readings.

    On a GPU work is only queued, so a step whose phases are to be told apart (`exact`) waits for the device at each
    border; all other steps run without waiting, and only their total is right.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_exact = True
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin = time.perf_counter()

    def begin_step(self, *, is_exact: bool) -> None:
        """A new step; `is_exact` for one whose split will be read. Forgets the phases of the step before."""
        self.is_exact = is_exact
        self.seconds.clear()
        self.begin = self.now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the enclosed work's time to `name`."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def now(self) -> float:
        """Seconds on a monotonic clock, after the device's queued work in an exact step."""
        if self.is_exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def split(self) -> dict[str, float]:
        """Seconds of the current step, `step_seconds`, and of each phase in it, `data_seconds` and so on."""
        parts = {f"{name}_seconds": self.seconds[name] for name in PHASES}
        return {"step_seconds": self.now() - self.begin, **parts}
