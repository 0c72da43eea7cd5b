"""What an evaluation is given of the run, and what it has found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.base.progress import tracked
from deberta_xl.data.loader import prefetch
from deberta_xl.objectives.micro_batch import pinned

if TYPE_CHECKING:
    from deberta_xl.run.figure_text import Picture

Item = TypeVar("Item")
BATCHES_AHEAD = 2
"""Held-out micro-batches that are prepared in the background."""
Model = Callable[..., Any]
"""What is trained as it is called: the engine, or the plain module."""
Sums = Mapping[str, Tensor]
"""Name of a figure -> one number on the device."""


class Judged(NamedTuple):
    """A micro-batch and what the model says of it."""

    batch: Any
    """On the host."""
    sums: Sums
    """Its figures, undivided."""
    guesses: Tensor


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What an evaluation is given of the run."""

    model: Model
    """In evaluation mode, without gradients."""
    device: torch.device
    rank: int = 0
    size: int = 1
    """This data-parallel rank among all: each sees another part of the held-out data."""
    group: dist.ProcessGroup | None = None
    """Those ranks; None for all."""
    is_first: bool = True
    """Whether this rank shows what was found: the others need not draw anything."""
    guard: Callable[[Iterable[Item]], Iterator[Item]] = iter
    """What batches go through on their way, once; it may end the evaluation by raising."""
    through_stages: Callable[[Iterable[Any]], Iterator[Judged]] | None = None
    """Where the model is a stage of a pipeline: how micro-batches go through it."""

    def batches(self, batches: Iterable[Item], *, does: str, count: int = 0) -> Iterator[Item]:
        """Named tuples of the host's tensors, prepared in the background, with progress in what the rank `does`.

        `count` is how many there are, where it is known.
        """
        ready = (pinned(batch) for batch in batches) if self.device.type == "cuda" else batches
        return tracked(self.guard(prefetch(ready, BATCHES_AHEAD)), does, count, "batches")

    @staticmethod
    def fetch(tensor: Tensor) -> Tensor:
        """A copy on the host, which is whole once the device has been waited for (`wait`, `totals`)."""
        return tensor.to("cpu", non_blocking=True)

    def wait(self) -> None:
        """Until the device has done all that it was told: once, when an evaluation comes to its end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def totals(self, *of_rank: Tensor) -> list[Tensor]:
        """The sums of these over all data, on the host in float64, which counts exactly up to 2⁵³. Collective.

        One exchange between the ranks, and one wait for the device.
        """
        numbers = [part.to(self.device, torch.float64, non_blocking=True).flatten() for part in of_rank]
        found = self.fetch(self.add_up(torch.cat(numbers)))
        self.wait()
        return [part.view(own.shape) for part, own in zip(found.split([*map(len, numbers)]), of_rank, strict=True)]

    def add_up(self, sums: Tensor) -> Tensor:
        """In place: the sum of `sums` over all data. Collective."""
        if self.size > 1:
            dist.all_reduce(sums, group=self.group)
        return sums


class Evaluation(NamedTuple):
    """What an evaluation has found."""

    values: Mapping[str, float | None]
    """Name -> value; logged as `valid_NAME`. None is not known here."""
    line: str
    """For the console."""
    texts: Mapping[str, str] = {}
    """Name -> Markdown, for TensorBoard."""
    pictures: Mapping[str, Picture] = {}
