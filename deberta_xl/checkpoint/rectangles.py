"""Where the elements that two ranks share lie on either, when the ranks hold a parameter cut in different ways.

A parameter is seen as a matrix: its first dimension by all others, in every layout. What a tensor-parallel rank holds
is a range of its rows or of its columns; what ZeRO leaves of that to a data-parallel rank is a contiguous range of the
flat shard, at most three rectangles (the end of a row, whole rows, the beginning of a row); and what two ranks share is
the intersection of rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from deberta_xl.parallel.shard import Shard


class Rectangle(NamedTuple):
    """Rows `top` … `bottom` − 1 and columns `left` … `right` − 1 of a matrix, row by row in a flat tensor."""

    top: int
    bottom: int
    left: int
    right: int
    start: int
    """Where its first element lies in the flat tensor."""

    @property
    def width(self) -> int:
        """Columns, which is also the distance between rows in the flat tensor."""
        return self.right - self.left

    @property
    def numel(self) -> int:
        """Elements of the rectangle."""
        return (self.bottom - self.top) * self.width

    def position(self, row: int, column: int) -> int:
        """Where an element of the matrix lies in the flat tensor."""
        return self.start + (row - self.top) * self.width + column - self.left


class Overlap(NamedTuple):
    """What two flat tensors have in common: `rows` runs of `columns` elements, at equal distances in each."""

    rows: int
    columns: int
    source_start: int
    source_stride: int
    target_start: int
    target_stride: int

    @property
    def source_end(self) -> int:
        """First element behind the last run in the source."""
        return self.source_start + (self.rows - 1) * self.source_stride + self.columns

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy from the source's elements `source_start` … `source_end` − 1 into the whole flat target."""
        size = (self.rows, self.columns)
        target = target[self.target_start :].as_strided(size, (self.target_stride, 1))
        target.copy_(source.as_strided(size, (self.source_stride, 1)))


def shard_area(shard: Shard) -> Rectangle:
    """What a shard holds of the parameter's matrix, padding left out."""
    shape = shard.logical_shape
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if shard.size == 1:
        return Rectangle(0, rows, 0, columns, start=0)
    if shard.dim == 0:
        return Rectangle(shard.start, shard.end, 0, columns, start=0)
    inner = math.prod(shape[2:])
    return Rectangle(0, rows, shard.start * inner, shard.end * inner, start=0)


def range_rectangles(area: Rectangle, offset: int, numel: int) -> list[Rectangle]:
    """The elements `offset` … `offset + numel − 1` of a flat area; `start` counts from the first of them."""
    found, reached, end = [], offset, offset + numel
    while reached < end:
        row, column = divmod(reached, area.width)
        rows, columns = 1, min(area.width - column, end - reached)
        if columns == area.width:
            rows = (end - reached) // area.width
        top, left = area.top + row, area.left + column
        found.append(Rectangle(top, top + rows, left, left + columns, start=reached - offset))
        reached += rows * columns
    return found


def overlaps(source: Sequence[Rectangle], target: Sequence[Rectangle]) -> Iterator[Overlap]:
    """What two ranges of one parameter have in common; both are sorted by rows, as `range_rectangles` gives them."""
    if not (source and target) or source[-1].bottom <= target[0].top or target[-1].bottom <= source[0].top:
        return
    for a in source:
        for b in target:
            top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
            left, right = max(a.left, b.left), min(a.right, b.right)
            if top < bottom and left < right:
                yield Overlap(
                    rows=bottom - top,
                    columns=right - left,
                    source_start=a.position(top, left),
                    source_stride=a.width,
                    target_start=b.position(top, left),
                    target_stride=b.width,
                )
