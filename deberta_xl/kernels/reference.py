"""Disentangled attention in the paper's words (He et al. 2021, arXiv 2006.03654, section 3.1).

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   N heads on this rank   H head size   R relative rows (2k)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def disentangled_scores(
    query_BNSH: Tensor,
    key_BNTH: Tensor,
    position_key_NRH: Tensor,
    position_query_NRH: Tensor | None,
    delta: Tensor,
) -> Tensor:
    """Eq. (4): content-to-content + content-to-position (+ position-to-content), scaled, [B, N, S, T].

    `delta` [S, T] or [B, S, T] holds the relative row of every pair; without `position_query_NRH` the third term is
    left out. The scale is 1/sqrt(d n) with n the number of terms.
    """
    index_BNST = delta.unsqueeze(-3).expand(*query_BNSH.shape[:3], key_BNTH.shape[2])
    scores_BNST = query_BNSH @ key_BNTH.transpose(-1, -2)
    scores_BNST = scores_BNST + (query_BNSH @ position_key_NRH.transpose(-1, -2)).gather(-1, index_BNST)
    num_terms = 2
    if position_query_NRH is not None:
        # The paper indexes this term with delta(j, i); the released models were trained with delta(i, j), and their
        # weights must stay usable.
        scores_BNST = scores_BNST + (position_query_NRH @ key_BNTH.transpose(-1, -2)).gather(-2, index_BNST)
        num_terms = 3
    return scores_BNST / math.sqrt(query_BNSH.shape[-1] * num_terms)


def masked_softmax(scores_BNST: Tensor, mask_BST: Tensor) -> Tensor:
    """Softmax over the keys that `mask_BST` (bool) allows; exactly 0 elsewhere, all 0 for a query that sees none."""
    blocked_B1ST = ~mask_BST.unsqueeze(1)
    # The smallest finite number instead of -inf: a row without any key would be NaN, also in the backward pass.
    scores_BNST = scores_BNST.masked_fill(blocked_B1ST, torch.finfo(scores_BNST.dtype).min)
    return scores_BNST.softmax(-1).masked_fill(blocked_B1ST, 0.0)


def disentangled_attention(
    query_BNSH: Tensor,
    key_BNTH: Tensor,
    value_BNTH: Tensor,
    position_key_NRH: Tensor,
    position_query_NRH: Tensor | None,
    delta: Tensor,
    mask_BST: Tensor,
    dropout: Callable[[Tensor], Tensor],
) -> Tensor:
    """The context [B, N, S, H] of every query.

    `delta` [S, T] (Toeplitz: it depends on i − j alone) or [B, S, T] (chosen queries), `mask_BST` bool. Scores and
    softmax are computed in float32 or better, as the original does; `dropout` is applied to the probabilities.
    """
    dtype = query_BNSH.dtype
    score_dtype = torch.promote_types(dtype, torch.float32)
    query_BNSH, key_BNTH, position_key_NRH = (t.to(score_dtype) for t in (query_BNSH, key_BNTH, position_key_NRH))
    if position_query_NRH is not None:
        position_query_NRH = position_query_NRH.to(score_dtype)
    scores_BNST = disentangled_scores(query_BNSH, key_BNTH, position_key_NRH, position_query_NRH, delta)
    return dropout(masked_softmax(scores_BNST, mask_BST).to(dtype)) @ value_BNTH
