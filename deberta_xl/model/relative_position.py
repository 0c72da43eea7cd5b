"""Relative positions: logarithmic buckets, the index δ(i, j) of eq. (3), and the table all layers share.

Shape suffixes of this file:
    S queries (i)   T keys (j)   R relative rows (2k)   D hidden
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from deberta_xl.architecture import DebertaConfig


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
def relative_index(
    length: int,
    position_buckets: int,
    reach: int,
    device: torch.device,
    bucket_rule: Literal["original", "transformers"] = "original",
) -> Tensor:
    """δ(i, j) of eq. (3) for a sequence of `length`: the row of the relative table for query i and key j, int64 [S, T].

    Without buckets (`position_buckets` 0, v1) every distance below `reach` has its own row. Built once per length.
    """
    i_S1 = torch.arange(length, device=device).unsqueeze(1)
    j_1T = torch.arange(length, device=device).unsqueeze(0)
    offset_ST = i_S1 - j_1T
    span = position_buckets or reach
    bucket = {"original": log_bucket, "transformers": log_bucket_of_transformers}[bucket_rule]
    row_ST = bucket(offset_ST, position_buckets, reach) if position_buckets else offset_ST
    return (row_ST + span).clamp(0, 2 * span - 1)


class RelativePosition(nn.Module):
    """The relative table E, [2k, hidden], shared by all layers; calling it gives E as the layers see it."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.position_buckets = config.position_buckets
        self.reach = config.relative_reach
        self.bucket_rule = config.bucket_rule
        self.table = nn.Embedding(2 * config.relative_span, config.hidden_size)
        self.norm = (
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
            if config.normalize_relative_table
            else nn.Identity()
        )

    def forward(self) -> Tensor:
        """E, normalised where the configuration says so, [R, D]."""
        rows = torch.arange(self.table.num_embeddings, device=self.table.weight.device)
        return self.norm(self.table(rows))

    def index(self, length: int, device: torch.device) -> Tensor:
        """δ(i, j) for a sequence of `length`, [S, T]."""
        return relative_index(length, self.position_buckets, self.reach, device, self.bucket_rule)
