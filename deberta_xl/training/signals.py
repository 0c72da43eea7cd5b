"""Stop signals, and the one small agreement that all ranks make before each step."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from deberta_xl.log import logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that SIGTERM or SIGUSR1 asked this process to stop at the next step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = signal.Signals(number)
        logger.warning("received %s: will save a checkpoint and stop after this step", self.signal.name)


class Agreement:
    """Sums and decisions over all ranks, on the host: a gloo group, so that no device has to be waited for."""

    def __init__(self) -> None:
        is_gloo = dist.get_backend() == "gloo"
        self.group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo")

    def before_step(self, num_labels: int, stop: StopRequest) -> tuple[int, bool]:
        """The sum of what every rank counts of the step's labelled positions, and whether any was asked to stop."""
        votes = torch.tensor([num_labels, int(stop.signal is not None)], dtype=torch.int64)
        dist.all_reduce(votes, group=self.group)
        return int(votes[0]), bool(votes[1])
