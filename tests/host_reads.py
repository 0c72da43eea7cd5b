"""What would make the host wait for a GPU, seen on a CPU: calls whose outcome the host has to know.

    with HostReads() as reads:
        loss.backward()
    assert reads.found == []

`on_device` is for what runs outside autograd's kernels: tensors that stand for some on a GPU, and note who reads them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "unique_dim", "_unique2",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip
"""Operators of torch whose result, or its size, is known to the device alone."""
BY_NAME = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", *READS}
"""Functions of tensors that read them."""
OWN = ("/torch/", "host_reads.py")
CPUS_LOOK = ("kernels/contract.py", "kernels/relative_index.py", "kernels/dropout.py")
"""Where documents are looked at on a CPU alone; that nothing waits there on a GPU, `tests/gpu/test_device.py` shows."""


class HostReads(TorchDispatchMode):
    """Notes where the host reads, in forward and in backward: `operator at file:line`. What `cpu` has fetched, and what
    is computed of that alone, may be read as often as one likes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.fetched: dict[int, Tensor] = {}
        """By their ids."""
        self.patches = [mock.patch.object(Tensor, name, self.noting(name)) for name in ("cpu", "tolist")]

    def __enter__(self) -> HostReads:
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def noting(self, name: str) -> Callable[[Tensor], Any]:
        """A function of tensors that reads without asking torch's dispatcher on a CPU."""
        function = getattr(Tensor, name)

        def read(tensor: Tensor) -> Any:
            if not self.has_fetched(tensor):
                self.note(name)
            found = function(tensor)
            if name == "cpu":
                found = found.clone()
                self.fetched[id(found)] = found
            return found

        return read

    def has_fetched(self, tensor: Tensor) -> bool:
        """Whether it would be the host's."""
        return id(tensor) in self.fetched

    def note(self, name: str) -> None:
        """A read, by whoever has called torch."""
        frames = traceback.extract_stack()
        # AdamW's own form for CPUs reads its number of steps; the fused one of GPUs has it there.
        if not any("/torch/optim/" in frame.filename for frame in frames):
            caller = next(f for f in reversed(frames) if not any(part in f.filename for part in OWN))
            if not caller.filename.endswith(CPUS_LOOK):
                self.found.append(f"{name} at {caller.filename}:{caller.lineno}")

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        is_read = name in READS and not self.has_fetched(args[0])
        if is_read or (name in ("index", "index_put", "index_put_") and is_masked(args)):
            self.note(name)
        found = function(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if given and all(map(self.has_fetched, given)):
            self.fetched |= {id(value): value for value in tree_leaves(found) if isinstance(value, Tensor)}
        return found


def is_masked(args: Sequence[Any]) -> bool:
    """Whether an index is a mask, whose places would have to be counted; a single number is written without that."""
    masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not (len(args) > 2 and args[2].numel() == 1)


class OnDevice(Tensor):
    """A tensor that stands for one on a GPU; so does whatever is computed with it."""

    reads: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.__name__
        indices = tree_leaves(args[1:] if name in ("__getitem__", "__setitem__") else ())
        if name in BY_NAME or any(isinstance(index, Tensor) and index.dtype is torch.bool for index in indices):
            cls.reads.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


def on_device(values: Any) -> Any:
    """The same tensors, lists and tuples of them as `OnDevice`."""
    return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(OnDevice), values)
