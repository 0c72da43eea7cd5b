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
    """The relative table E, [2k, hidden]; calling it gives E as the layers see it. Where no term reads it, only the
    buckets are here."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.buckets = Buckets(config.position_buckets, config.relative_reach, config.bucket_rule)
        self.table = nn.Embedding(config.relative_rows, config.hidden_size) if config.relative_rows else None
        is_normalized = config.normalize_relative_table and self.table is not None
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if is_normalized else nn.Identity()

    def forward(self) -> Tensor | None:
        """E, normalised where the configuration says so, [R, D]; None where there is none."""
        if self.table is None:
            return None
        rows = torch.arange(self.table.num_embeddings, device=self.table.weight.device)
        return self.norm(self.table(rows))
