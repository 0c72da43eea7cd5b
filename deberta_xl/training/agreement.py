"""The small agreement that all ranks make on each step and each held-out batch: on its counts, and on stopping.

A sum over thousands of ranks takes as long as a forward pass of one of them. So it is asked one step, or one batch,
ahead, and nobody waits for the answer: a run stops at the end of the step after the one in which it was asked to.
"""

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


class Question:
    """A sum over all ranks that is under way."""

    def __init__(self, votes: torch.Tensor):
        """Collective; returns at once."""
        self.votes = votes
        self.work = dist.all_reduce(votes, group=host_group(), async_op=True)

    def answer(self) -> list[int]:
        """The sums, once all ranks have asked."""
        self.work.wait()
        return self.votes.tolist()


class Agreement:
    """Sums and decisions over all ranks, on the host, so that no device has to be waited for."""

    def __init__(self) -> None:
        self.has_told = False
        self.is_stopping = False
        """Whether any rank was asked to stop, as far as all ranks have heard by now."""

    def ask(self, counts: Sequence[int], stop: StopRequest) -> Question:
        """Begin to add up what every rank counts of something to come, and how many are asked to stop. Collective."""
        stop.listen()
        signal = stop.signal  # read once: it may come between two lines
        if signal is not None and not self.has_told:
            logger.warning("received %s: saving a checkpoint and stopping", signal.name)
            self.has_told = True
        return Question(torch.tensor([*counts, int(signal is not None)], dtype=torch.int64))

    def hear(self, question: Question) -> list[int]:
        """The sums of what was counted; `is_stopping` is up to date afterwards, on all ranks alike. Collective."""
        *sums, num_stopping = question.answer()
        self.is_stopping |= num_stopping > 0
        return sums

    def until_stopped(self, batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
        """The batches of an evaluation, of which all ranks have equally many.

        Raises StopRequested, on all ranks before the same batch, once any rank was asked to stop.
        """
        question = self.ask((), stop)
        for batch in batches:
            self.hear(question)
            if self.is_stopping:
                raise StopRequested
            question = self.ask((), stop)
            yield batch
        self.hear(question)
