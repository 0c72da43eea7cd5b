"""What all layers see beside the states: which tokens see which, how far apart, and where random masks come from.

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   M chosen queries   D hidden   R relative rows (2k)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.model.dropout import DropoutKey, fold_key


class Pairs(NamedTuple):
    """What is known of every pair of query i and key j."""

    delta: Tensor
    """Row of the relative table, int64 [S, T] or [B, S, T]."""
    mask_BST: Tensor
    """Whether i may see j, bool."""

    def of_queries(self, position_BM: Tensor) -> Pairs:
        """The pairs of chosen queries only: `position_BM` holds their positions in the sequence."""
        rows = position_BM.unsqueeze(-1).expand(-1, -1, self.mask_BST.shape[-1])
        return Pairs(self.delta[position_BM], self.mask_BST.gather(1, rows))


class Scene(NamedTuple):
    """Travels through a pass as one value, from the embeddings to the head.

    A tuple, since ZeRO-3 looks for tensors that need gradients (the relative table) in tuples, lists and dicts only.
    """

    segments_BS: Tensor
    """Number of the document each token belongs to, 0 at padding."""
    relative_RD: Tensor
    """The relative table as the layers see it; differentiable."""
    pairs: Pairs
    key: DropoutKey | None = None
    """Names the dropout masks of this place; torch's global generator draws them when absent."""

    def within(self, *names: str | int) -> Scene:
        """The scene of a place inside this one, for example `scene.within("layers", 3)`: it has masks of its own."""
        return self._replace(key=fold_key(self.key, *names))

    def of_queries(self, position_BM: Tensor | None) -> Scene:
        """The scene of chosen queries, which see what they saw; the same scene for None, all of them."""
        return self if position_BM is None else self._replace(pairs=self.pairs.of_queries(position_BM))


def read_mask(input_ids_BS: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Segments [B, S] and pair mask [B, S, S] from any form of attention mask."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids_BS)
    if attention_mask.dim() == 3:
        mask_BST = attention_mask > 0
        return mask_BST.any(dim=1).long(), mask_BST
    segments_BS = attention_mask.long()
    return segments_BS, pair_mask(segments_BS)


def pair_mask(segments_BS: Tensor) -> Tensor:
    """Which tokens see which: those of the same document, padding none; bool [B, S, S]."""
    is_same_BST = segments_BS.unsqueeze(2) == segments_BS.unsqueeze(1)
    return is_same_BST & (segments_BS > 0).unsqueeze(1)
