"""The one small agreement that all ranks make before each step and each held-out batch: on labels, and on stopping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from deberta_xl.log import logger
from deberta_xl.stop_request import StopRequest

Batch = TypeVar("Batch")


class StopRequested(Exception):
    """An evaluation was left unfinished, since a rank was asked to stop."""


class Agreement:
    """Sums and decisions over all ranks, on the host: a gloo group, so that no device has to be waited for."""

    def __init__(self) -> None:
        is_gloo = dist.get_backend() == "gloo"
        self.has_told = False
        self.group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo")

    def before_step(self, num_labels: int, stop: StopRequest) -> tuple[int, bool]:
        """The sum of what every rank counts of the step's labelled positions, and whether any was asked to stop."""
        if stop.signal is not None and not self.has_told:
            logger.warning("received %s: saving a checkpoint and stopping", stop.signal.name)
            self.has_told = True
        votes = torch.tensor([num_labels, int(stop.signal is not None)], dtype=torch.int64)
        dist.all_reduce(votes, group=self.group)
        return int(votes[0]), bool(votes[1])

    def until_stopped(self, batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
        """The batches of an evaluation, of which all ranks have equally many.

        Raises StopRequested, on all ranks before the same batch, once any rank was asked to stop.
        """
        for batch in batches:
            if self.before_step(0, stop)[1]:
                raise StopRequested
            yield batch
