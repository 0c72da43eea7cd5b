"""Disentangled attention in the paper's words (He et al. 2021, arXiv 2006.03654, section 3.1).

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   N heads on this rank   H head size   R relative rows (2k)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deberta_xl.kernels.contract import Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule, keep_pairs


def disentangled_scores(
    query_BNSH: Tensor,
    key_BNTH: Tensor,
    relative: RelativeRows,
    where: Where,
) -> Tensor:
    """Eq. (4): content-to-content (+ content-to-position) (+ position-to-content), scaled, [B, N, S, T].

    A term whose rows are not there is left out. The scale is 1/sqrt(d n) with n the number of terms.
    """
    scores_BNST = query_BNSH @ key_BNTH.transpose(-1, -2)
    if relative.key_NRH is None and relative.query_NRH is None:
        return scores_BNST / math.sqrt(query_BNSH.shape[-1])
    index_BNST = where.delta.unsqueeze(-3).expand(*query_BNSH.shape[:3], key_BNTH.shape[2])
    num_terms = 1
    if relative.key_NRH is not None:
        scores_BNST = scores_BNST + (query_BNSH @ relative.key_NRH.transpose(-1, -2)).gather(-1, index_BNST)
        num_terms += 1
    if relative.query_NRH is not None:
        # The paper indexes this term with delta(j, i); the released models were trained with delta(i, j), and their
        # weights must stay usable.
        scores_BNST = scores_BNST + position_to_content(relative.query_NRH, key_BNTH, index_BNST)
        num_terms += 1
    return scores_BNST / math.sqrt(query_BNSH.shape[-1] * num_terms)


def position_to_content(position_query_NRH: Tensor, key_BNTH: Tensor, index_BNST: Tensor) -> Tensor:
    """The third term, [B, N, S, T]: every row with every key, of which those at `index_BNST` are taken.

    One query of a sequence, as generation has it at each step, needs one row for each key, not all R.
    """
    if index_BNST.shape[2] > 1:
        return (position_query_NRH @ key_BNTH.transpose(-1, -2)).gather(-2, index_BNST)
    index_BNTH = index_BNST.transpose(-1, -2).expand_as(key_BNTH)
    row_BNTH = position_query_NRH.expand(len(key_BNTH), -1, -1, -1).gather(2, index_BNTH)
    return (row_BNTH * key_BNTH).sum(-1).unsqueeze(2)


def masked_softmax(scores_BNST: Tensor, blocked_BST: Tensor) -> Tensor:
    """Softmax over the keys that are not blocked (bool); exactly 0 elsewhere, all 0 for a query that sees none."""
    blocked_B1ST = blocked_BST.unsqueeze(1)
    # The smallest finite number instead of -inf: a row without any key would be NaN, also in the backward pass.
    scores_BNST = scores_BNST.masked_fill(blocked_B1ST, torch.finfo(scores_BNST.dtype).min)
    return scores_BNST.softmax(-1).masked_fill(blocked_B1ST, 0.0)


def attention(query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Tensor:
    """The contract's `Attend`, on dense matrices of pairs."""
    dtype = query_BNSH.dtype
    score_dtype = torch.promote_types(dtype, torch.float32)
    key_BNTH, value_BNTH = memory
    query_BNSH, key_BNTH = query_BNSH.to(score_dtype), key_BNTH.to(score_dtype)
    relative = RelativeRows(*(None if rows is None else rows.to(score_dtype) for rows in relative))
    scores_BNST = disentangled_scores(query_BNSH, key_BNTH, relative, where)
    probabilities_BNST = masked_softmax(scores_BNST, where.blocked_BST).to(dtype)
    if dropout.rate:
        kept_BNST = keep_pairs(where.places, *probabilities_BNST.shape[1::2], dropout.with_seed())
        probabilities_BNST = (probabilities_BNST * kept_BNST).mul_(dropout.scale)
    return probabilities_BNST @ value_BNTH
