"""The small agreement that all ranks make before each step and each held-out batch: on its counts, and on stopping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from deberta_xl.base.log import logger
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.parallel.host_group import host_group

Batch = TypeVar("Batch")


class StopRequested(Exception):
    """An evaluation was left unfinished, since a rank was asked to stop."""


class Agreement:
    """Sums and decisions over all ranks, on the host, so that no device has to be waited for."""

    def __init__(self) -> None:
        self.has_told = False

    def before_step(self, counts: Sequence[int], stop: StopRequest) -> tuple[list[int], bool]:
        """The sums of what every rank counts of the step, and whether any was asked to stop."""
        stop.listen()
        signal = stop.signal  # read once: it may come between two lines
        if signal is not None and not self.has_told:
            logger.warning("received %s: saving a checkpoint and stopping", signal.name)
            self.has_told = True
        votes = torch.tensor([*counts, int(signal is not None)], dtype=torch.int64)
        dist.all_reduce(votes, group=host_group())
        *sums, num_stopping = votes.tolist()
        return sums, num_stopping > 0

    def until_stopped(self, batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
        """The batches of an evaluation, of which all ranks have equally many.

        Raises StopRequested, on all ranks before the same batch, once any rank was asked to stop.
        """
        for batch in batches:
            if self.before_step((), stop)[1]:
                raise StopRequested
            yield batch
