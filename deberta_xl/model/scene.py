"""What all layers see beside the states: which tokens see which, how far apart, and where random masks come from.

Shape suffixes of this file:
    B batch   S sequence   T keys   M chosen queries   D hidden   R relative rows (2k)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels.contract import RelativeRows, Where
from deberta_xl.kernels.relative_index import Buckets
from deberta_xl.model.dropout import DropoutKey, fold_key


class Scene(NamedTuple):
    """Travels through a pass as one value, from the embeddings to the head.

    A tuple, since ZeRO-3 looks for tensors that need gradients (the relative table) in tuples, lists and dicts only.
    """

    where: Where
    """Where the queries and the tokens they may see stand."""
    relative_RD: Tensor | None
    """The relative table as the layers see it; differentiable. None where none reads one."""
    key: DropoutKey | None = None
    """Names the dropout masks of this place; torch's global generator draws them when absent."""
    row_BS: Tensor | None = None
    """Numbers of the states among all of the micro-batch, of which their dropout masks follow; in order when absent."""
    projected: RelativeRows | None = None
    """The table as the layer at hand projects it, where that has been done before; projected anew when absent."""

    @property
    def segments_BS(self) -> Tensor:
        """Number of the document each token belongs to, 0 at padding."""
        return self.where.segments_BT

    def within(self, *names: str | int) -> Scene:
        """The scene of a place inside this one, for example `scene.within("layers", 3)`: it has masks of its own."""
        return self._replace(key=fold_key(self.key, *names))

    def of_queries(self, position_BM: Tensor, row_BM: Tensor | None = None) -> Scene:
        """The scene of chosen queries, which see what they saw; their states are numbered in order, or as told."""
        return self._replace(where=self.where.of_queries(position_BM), row_BS=row_BM)


def read_mask(
    input_ids_BS: Tensor, attention_mask: Tensor | None, buckets: Buckets, open_BS: Tensor | None = None
) -> Where:
    """Where the tokens stand, from any form of attention mask, and which of them are seen from everywhere.

    Raises ConfigError for two rules of what sees what.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids_BS)
    if attention_mask.dim() == 3:
        if open_BS is not None:
            raise ConfigError(
                f"an attention mask of pairs, {list(attention_mask.shape)}, says all about what sees what: leave "
                "open_BS out, or give the attention mask as [batch, sequence]"
            )
        mask_BST = attention_mask > 0
        return Where(mask_BST.any(dim=1).long(), buckets, mask_BST)
    return Where(attention_mask.long(), buckets, open_BT=open_BS)
