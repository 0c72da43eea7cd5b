"""Stop signals, and the one small agreement that all ranks make before each step.

A signal handler may interrupt anything, a write to the console included: it notes what came, and nothing else.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from deberta_xl.log import logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_INTERRUPT_SECONDS = 2.0
"""Interrupts within this time are the same Ctrl-C."""


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or, once training runs, Ctrl-C asked this process to stop at the next step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.first_interrupt: float | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = signal.Signals(number)

    def watch_interrupts(self) -> None:
        """From now on the first Ctrl-C stops like the other signals; a later one ends the process at once."""
        signal.signal(signal.SIGINT, self.receive_interrupt)

    def receive_interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C. torchrun passes on what the terminal has sent already, so two at once are one."""
        self.first_interrupt = self.first_interrupt or time.monotonic()
        if time.monotonic() - self.first_interrupt > ONE_INTERRUPT_SECONDS:
            raise KeyboardInterrupt
        self.receive(number, frame)


class Agreement:
    """Sums and decisions over all ranks, on the host: a gloo group, so that no device has to be waited for."""

    def __init__(self) -> None:
        is_gloo = dist.get_backend() == "gloo"
        self.group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo")

    def before_step(self, num_labels: int, stop: StopRequest) -> tuple[int, bool]:
        """The sum of what every rank counts of the step's labelled positions, and whether any was asked to stop."""
        if stop.signal is not None:
            logger.warning("received %s: saving a checkpoint and stopping", stop.signal.name)
        votes = torch.tensor([num_labels, int(stop.signal is not None)], dtype=torch.int64)
        dist.all_reduce(votes, group=self.group)
        return int(votes[0]), bool(votes[1])
