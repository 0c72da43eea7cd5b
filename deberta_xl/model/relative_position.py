"""The relative table that all layers share; which of its rows belongs to a pair of tokens, its buckets say.

Shape suffixes of this file:
    R relative rows (2k)   D hidden
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deberta_xl.kernels.relative_index import Buckets
from deberta_xl.settings.architecture import DebertaConfig


class RelativePosition(nn.Module):
    """The relative table E, [2k, hidden]; calling it gives E as the layers see it."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.buckets = Buckets(config.position_buckets, config.relative_reach, config.bucket_rule)
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
