"""What a pass launches on a GPU, moves and keeps there, counted where there is none.

Tensors are on torch's meta device: they have shapes and no memory. Whoever asks is told that they are on a GPU, so the
model goes the way it goes there, and Triton's kernels are counted instead of launched. Numbers of the host among them,
or a look at what a tensor holds, for which a GPU would have to be waited for, raise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
LOOK_UPS = {"embedding", "gather", "index", "index_select"}
"""They read as many numbers of their first tensor as they give."""


class Launch(NamedTuple):
    """A kernel of the GPU."""

    name: str
    """An operator of torch, or a function of Triton's."""
    moved_bytes: int
    """Read and written, each tensor once, however often a kernel really reads it."""
    operations: int
    """Of matrix products; 0 for anything else, Triton's kernels among it."""


class Recorder(TorchDispatchMode):
    """Notes every launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operator."""
        outcome = operator(*arguments, **(named or {}))
        given, made = tensors_of((arguments, named)), tensors_of(outcome)
        packet = operator.overloadpacket
        name = packet.__name__
        storages = {storage_key(tensor) for tensor in given}
        is_view = not operator._schema.is_mutable and all(storage_key(tensor) in storages for tensor in made)
        if is_view or name in ALLOCATIONS:
            return outcome
        sizes = [num_bytes(tensor) for tensor in given]
        written = sum(map(num_bytes, made))
        if name in LOOK_UPS:
            sizes[0] = min(sizes[0], written)
        operations = (
            flop_registry[packet](*arguments, **(named or {}), out_val=outcome) if packet in flop_registry else 0
        )
        self.launches.append(Launch(name, sum(sizes) + written, operations))
        return outcome

    def note_triton(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """In place of `JITFunction.run`."""
        storages = {storage_key(tensor): num_bytes(tensor) for tensor in tensors_of((arguments, named))}
        self.launches.append(Launch(kernel.fn.__name__, sum(storages.values()), 0))


@contextmanager
def pretended_gpu(recorder: Recorder) -> Iterator[None]:
    """Tensors on the meta device are on a GPU here, and the recorder notes what is launched on it."""
    with patch.object(torch.Tensor, "is_cuda", True), recorder:
        if importlib.util.find_spec("triton") is None:
            yield
            return
        from triton.runtime.jit import JITFunction

        with patch.object(JITFunction, "run", lambda *arguments, **named: recorder.note_triton(*arguments, **named)):
            yield


def tensors_of(tree: Any) -> list[Tensor]:
    """All that are in it."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share their memory."""
    return tensor.untyped_storage()._cdata


def num_bytes(tensor: Tensor) -> int:
    """Really behind a tensor: one that is expanded is smaller than it looks."""
    return tensor.element_size() * prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0
    )


class SavedBytes:
    """Counts the bytes that autograd keeps alive, each storage once, and their peak."""

    def __init__(self, parameters: set[int]):
        self.parameters = parameters
        """The storages that are there anyway, by `storage_key`."""
        self.references: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Saved:
        """Called for every tensor that is saved."""
        return Saved(self, tensor)

    def add(self, tensor: Tensor, change: int) -> None:
        """One reference more or less."""
        key = storage_key(tensor)
        if key in self.parameters:
            return
        before = self.references.get(key, 0)
        self.references[key] = before + change
        if (before == 0 and change > 0) or before + change == 0:
            self.now += change * tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)


class Saved:
    """A saved tensor, as long as autograd holds it."""

    def __init__(self, counter: SavedBytes, tensor: Tensor):
        self.counter, self.tensor = counter, tensor
        counter.add(tensor, 1)

    def __del__(self) -> None:
        self.counter.add(self.tensor, -1)


@contextmanager
def counted_bytes(model: torch.nn.Module) -> Iterator[SavedBytes]:
    """What autograd keeps of the passes inside, without the model's parameters."""
    counter = SavedBytes({storage_key(parameter) for parameter in model.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.tensor):
        yield counter
