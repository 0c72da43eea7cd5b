"""What one forward takes: a named tuple of tensors that knows on the host what it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class MicroBatch(Protocol):
    """A NamedTuple of tensors, of other named tuples of tensors, and of what is no tensor."""

    @property
    def counts(self) -> Sequence[int]:
        """How many it has of each of `Objective.counts`, known without asking the device."""


Batch = TypeVar("Batch", bound=MicroBatch)


def with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same tuple with each tensor changed, those of tuples inside it, too."""
    return type(batch)(
        *(
            change(part) if isinstance(part, Tensor) else with_tensors(part, change) if is_named(part) else part
            for part in batch
        )
    )


def is_named(part: object) -> bool:
    """Whether it is a named tuple, whose tensors are the batch's."""
    return isinstance(part, tuple) and hasattr(part, "_fields")


def pinned(batch: Batch) -> Batch:
    """In memory from which a GPU copies without the processor's help."""
    return with_tensors(batch, Tensor.pin_memory)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A copy on `device`, without waiting for it where the source is pinned."""
    return with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
