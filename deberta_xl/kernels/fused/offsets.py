"""How offsets i − j fall into tiles and into rows of the relative table: numbers that the host knows.

Shape suffixes of this file:
    R relative rows (2k)   O offsets
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.kernels.relative_index import Buckets, offset_rows


class Offsets(NamedTuple):
    """How offsets i − j fall into tiles and into rows of the table."""

    saturation: int
    """Offsets of so much or more share a row, and so do those of its negative or less."""
    diagonals: int
    """Block diagonals on each side of the main one that have near tiles."""
    near: int
    """Most near tiles that a block of queries has."""
    has_far: bool
    """Whether any tile is far."""
    center: int
    """Expanded tables begin at minus this offset, and end at this one."""
    row_O: Tensor
    """Row of the table for every offset of an expanded one, int64, on the host."""
    first_row: int
    """Of the table, for saturated offsets of keys after the query."""
    last_row: int
    """The same for keys before it."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def read_offsets(length: int, buckets: Buckets, has_positions: bool, block: int) -> Offsets:
    """Of documents of up to `length` tokens. Computed on the host, from numbers that it has.

    Where no term reads positions every offset is as good as saturated.
    """
    host = torch.device("cpu")
    saturation = 0
    if has_positions:
        # Not of the length alone, or the place where a document lies would decide which of its tiles are far.
        horizon = max(length, 4 * buckets.reach)
        row_O = offset_rows(horizon, buckets, host)
        saturation = max(int((side != side[-1]).sum()) for side in (row_O[horizon - 1 :], row_O[:horizon].flip(0)))
    blocks = -(-length // block)
    diagonals = min((saturation + block - 2) // block, blocks - 1)
    center = (diagonals + 1) * block
    first_far = -(-(saturation + block - 1) // block)
    row_O = offset_rows(center + 1, buckets, host)
    return Offsets(saturation, diagonals, min(2 * diagonals + 1, blocks), first_far < blocks, center, row_O,
                   int(row_O[0]), int(row_O[-1]))  # fmt: skip


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def runs_of_rows(length: int, buckets: Buckets, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row of each offset, int64; where each row's run of offsets begins, and the end of the last, int32)."""
    row_O = read_offsets(length, buckets, True, block).row_O
    first_R = torch.searchsorted(row_O, torch.arange(2 * buckets.span + 1)).to(torch.int32)
    return row_O.to(device), first_R.to(device)
