"""Tensors that are known by shape and read one at a time, so that a model is converted without being held in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.base.progress import progress
from deberta_xl.checkpoint.manifest import CheckpointError


class LazyTensor(NamedTuple):
    """A tensor that is somewhere else until `read` is called; each call reads it anew."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    place: str
    """Where it comes from, for people: the file, and its name there."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


LazyTensors = dict[str, LazyTensor]
"""Name → tensor, in the order in which they are written."""


def in_memory(tensors: Mapping[str, Tensor], place: str) -> LazyTensors:
    """Tensors that are there already."""
    return {
        name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t.detach(), f"{place}: {name}")
        for name, t in tensors.items()
    }


def derived(make: Callable[..., Tensor], sources: Iterable[LazyTensor], shape: Iterable[int]) -> LazyTensor:
    """What `make` computes from other tensors, of the type of the first."""
    sources = list(sources)
    return LazyTensor(
        tuple(shape),
        sources[0].dtype,
        lambda: make(*(source.read() for source in sources)),
        " with ".join(source.place for source in sources),
    )


def constant(value: float, shape: Iterable[int], dtype: torch.dtype, place: str) -> LazyTensor:
    """A tensor filled with one value."""
    shape = tuple(shape)
    return LazyTensor(shape, dtype, lambda: torch.full(shape, value, dtype=dtype), place)


def read_all(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """The tensors themselves; the memory needed is that of all of them."""
    found = {}
    with progress("reading weights", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        for name, tensor in tensors.items():
            found[name] = tensor.read()
            advance(tensor.nbytes)
    return found


def in_type(tensors: LazyTensors, dtype: torch.dtype | None) -> LazyTensors:
    """The floating-point tensors rounded to `dtype`; as they are for None."""
    if dtype is None:
        return tensors
    return {name: _cast(name, t, dtype) if t.dtype.is_floating_point else t for name, t in tensors.items()}


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """One tensor in `dtype`. Reading it raises CheckpointError when a value lies beyond the range of `dtype`."""

    def read() -> Tensor:
        original = tensor.read()
        converted = original.to(dtype)
        if bool(torch.isfinite(original).all()) and not bool(torch.isfinite(converted).all()):
            raise CheckpointError(
                f"{name} ({tensor.place}) holds values beyond the range of {dtype}; choose --dtype bfloat16"
            )
        return converted

    return tensor._replace(dtype=dtype, read=read)


def check_finite(weights: Mapping[str, Tensor], source: Path) -> None:
    """Raises CheckpointError naming the first of the weights, read from `source`, that holds NaN or infinity."""
    for name, value in weights.items():
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinity: these weights are of no use; take an earlier checkpoint"
            )


def read_finite(name: str, tensor: LazyTensor) -> Tensor:
    """The tensor itself, contiguous. Raises CheckpointError naming it when it holds NaN or infinity."""
    value = tensor.read()
    assert tuple(value.shape) == tensor.shape, f"{name} is {tuple(value.shape)}, announced as {tensor.shape}"
    assert value.dtype == tensor.dtype, f"{name} is {value.dtype}, announced as {tensor.dtype}"
    if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{name} ({tensor.place}) holds NaN or infinity: these weights are of no use; take an earlier checkpoint"
        )
    return value.contiguous()
