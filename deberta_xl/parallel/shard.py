"""How tensor parallelism cuts a parameter: which part of the logical tensor, the plain model's, a rank holds."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """One of `size` equal parts of a tensor along a dimension.

    Dimension 0 (column-parallel weights and biases, vocabulary-parallel tables) need not divide: the last shards are
    then filled up with rows of zeros, the padding, which belongs to no logical tensor. Dimension 1 (row-parallel
    weights) must divide.

    A parameter that is a shard carries it as its attribute `tensor_parallel_shard`.
    """

    dim: int
    """The dimension that is cut, 0 or 1."""
    rank: int
    """Which part, 0 … size − 1."""
    size: int
    """Number of parts: the tensor-parallel size."""
    logical_shape: tuple[int, ...]
    """Shape of the whole tensor, without padding."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part, with padding."""
        return (*self.logical_shape[: self.dim], self._local_length, *self.logical_shape[self.dim + 1 :])

    @property
    def start(self) -> int:
        """First index of the part along `dim` of the logical tensor; its length when the part is all padding."""
        return min(self.rank * self._local_length, self.logical_shape[self.dim])

    @property
    def end(self) -> int:
        """First index behind the part along `dim`, padding left out."""
        return min((self.rank + 1) * self._local_length, self.logical_shape[self.dim])

    @property
    def numel(self) -> int:
        """Elements of the part, padding left out. They come first in the part's row-major flat view."""
        others = self.logical_shape[: self.dim] + self.logical_shape[self.dim + 1 :]
        return (self.end - self.start) * math.prod(others)

    def cut(self, full: Tensor) -> Tensor:
        """A copy of this part of the logical tensor `full`, in `local_shape`."""
        assert full.shape == self.logical_shape, f"{tuple(full.shape)} is not {self.logical_shape}"
        part = full.detach().new_zeros(self.local_shape)
        length = self.end - self.start
        part.narrow(self.dim, 0, length).copy_(full.detach().narrow(self.dim, self.start, length))
        return part

    @property
    def _local_length(self) -> int:
        """Length of every part along `dim`, with padding."""
        length = self.logical_shape[self.dim]
        assert self.dim == 0 or length % self.size == 0, f"{self.size} does not divide {length}, the length of dim 1"
        return -(-length // self.size)


def shard_of(parameter: Tensor) -> Shard | None:
    """The shard that a parameter of a tensor-parallel model is; None when every rank holds all of it."""
    return getattr(parameter, "tensor_parallel_shard", None)
