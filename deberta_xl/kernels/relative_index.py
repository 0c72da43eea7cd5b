"""Relative positions as rows of the relative table: logarithmic buckets, and the index δ(i, j) of eq. (3).

Shape suffixes of this file:
    S queries (i)   T keys (j)   W offsets
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Buckets(NamedTuple):
    """How distances fall into rows of the relative table."""

    position_buckets: int
    """Logarithmic buckets on each side of the table (k); 0 gives every distance below `reach` its own row (v1)."""
    reach: int
    """Farthest distance told apart, plus one."""
    rule: Literal["original", "transformers"] = "original"

    @property
    def span(self) -> int:
        """Rows of the table on each side (k)."""
        return self.position_buckets or self.reach


def log_bucket(offset: Tensor, position_buckets: int, reach: int) -> Tensor:
    """Signed offset i − j -> signed bucket: exact up to `position_buckets` / 2, logarithmic up to `reach` − 1.

    Offsets beyond `reach` − 1 share the last bucket. The rounding at bucket borders is that of float32, in which the
    released models were trained.
    """
    middle = position_buckets // 2
    offset = offset.clamp(-(reach - 1), reach - 1)
    distance = offset.abs().clamp(min=middle).to(torch.float32)
    far = torch.ceil(torch.log(distance / middle) / math.log((reach - 1) / middle) * (middle - 1)) + middle
    return torch.where(offset.abs() <= middle, offset, offset.sign() * far.to(offset.dtype))


def log_bucket_of_transformers(offset: Tensor, position_buckets: int, reach: int) -> Tensor:
    """`log_bucket` as transformers computes it (make_log_bucket_position): all in float32, and no limit at `reach`.

    Offsets beyond `reach` − 1 get buckets of `position_buckets` and more.
    """
    middle = position_buckets // 2
    distance = torch.where(offset.abs() < middle, middle - 1, offset.abs())
    constant = torch.log(torch.tensor((reach - 1) / middle, device=offset.device))
    far = torch.ceil(torch.log(distance / middle) / constant * (middle - 1)) + middle
    return torch.where(distance <= middle, offset, (offset.sign() * far).to(offset.dtype))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # an inference tensor kept here could not take part in a later training step
def offset_rows(length: int, buckets: Buckets, device: torch.device) -> Tensor:
    """The row of the relative table of every offset i − j from −(length − 1) to length − 1, int64 [W].

    Made on the CPU wherever it is needed: a GPU's logarithms end in other bits, which moves distances at the buckets'
    borders into the next one.
    """
    offset_W = torch.arange(1 - length, length, device="cpu")
    bucket = {"original": log_bucket, "transformers": log_bucket_of_transformers}[buckets.rule]
    row_W = bucket(offset_W, buckets.position_buckets, buckets.reach) if buckets.position_buckets else offset_W
    return (row_W + buckets.span).clamp(0, 2 * buckets.span - 1).to(device)


@lru_cache(maxsize=4096)
def rows_in_reach(length: int, buckets: Buckets) -> slice:
    """The rows of the relative table that offsets in a sequence of `length` tokens fall into; all of them where fewer
    than an eighth would be left out, which saves less than zeros in their place cost."""
    rows_W = offset_rows(length, buckets, torch.device("cpu"))
    first, end, num_rows = int(rows_W[0]), int(rows_W[-1]) + 1, 2 * buckets.span
    return slice(first, end) if 8 * (end - first) <= 7 * num_rows else slice(0, num_rows)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def relative_index(length: int, buckets: Buckets, device: torch.device) -> Tensor:
    """δ(i, j) of eq. (3) for a sequence of `length`: the row of the relative table for query i and key j, int64 [S, T].

    Built once per length.
    """
    position_S = torch.arange(length, device=device)
    return offset_rows(length, buckets, device)[position_S.unsqueeze(1) - position_S + (length - 1)]
