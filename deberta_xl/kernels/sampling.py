"""Drawing tokens from logits, by a counter: what is drawn is a function of a seed and of places.

The largest of logit + Gumbel noise is a draw from softmax(logits). An element's noise follows from the hash of
`dropout.py` of (seed of its sequence, position, column). So tensor-parallel ranks, which have some columns each, find
together what one rank would find alone, and a resumed run draws what an uninterrupted one draws. The largest of sums
is also robust: rounding changes it only where two are within rounding of each other, while the place where cumulated
probabilities pass a random number would change with every rounding on the way.

Shape suffixes of this file:
    L positions   V vocabulary (this rank's part)   C positions of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.kernels.dropout import hash_words

ELEMENTS_AT_ONCE = 2**22
"""Noise is made for so many logits at a time."""


class DrawRule(NamedTuple):
    """How tokens are drawn."""

    seed_B: Tensor
    """63 bits for each sequence, int64."""
    temperature: float = 1.0
    """The logits are divided by it."""


class Drawn(NamedTuple):
    """What was drawn at each position."""

    value_L: Tensor
    """Logit + noise of the winner: of several parts of the vocabulary the largest wins."""
    token_L: Tensor


def draw_tokens(
    logits_LV: Tensor,
    position_L: Tensor,
    seed_L: Tensor,
    temperature: float = 1.0,
    *,
    first_column: int = 0,
    num_columns: int | None = None,
) -> Drawn:
    """One token for each position, drawn from softmax(logits / temperature); without gradients.

    The noise is a function of seed and position (int64). These are the columns from `first_column` on of a vocabulary
    of `num_columns`.
    """
    width = logits_LV.shape[-1]
    chunk = max(1, ELEMENTS_AT_ONCE // width)
    column_V = torch.arange(first_column, first_column + width, dtype=torch.int32, device=logits_LV.device)
    found = []
    with torch.no_grad():
        for logits_CV, *row in zip(*(x.split(chunk) for x in (logits_LV, position_L, seed_L)), strict=True):
            noise_CV = gumbel_noise(*row, column_V, num_columns or width)
            found.append(noise_CV.add_(logits_CV, alpha=1 / temperature).max(-1))
    values, indices = zip(*found, strict=True)
    return Drawn(torch.cat(values), torch.cat(indices) + first_column)


def gumbel_noise(position_C: Tensor, seed_C: Tensor, column_V: Tensor, num_columns: int) -> Tensor:
    """−ln(−ln(1 − u)), float32 [C, V], where u = (31 bits of the hash + ½) / 2³¹ of each (position, column).

    Small u are exact to their last bit, and it is from them that large noise comes.
    """
    stride_C = 2 * (seed_C >> 32) + 1
    # Integers wrap around: what is said modulo 2**32 may be computed modulo 2**64 first.
    first_C = (position_C * num_columns * stride_C + seed_C).to(torch.int32)
    words_CV = (stride_C.to(torch.int32).unsqueeze(-1) * column_V).add_(first_C.unsqueeze(-1))
    hash_words(words_CV, torch.empty_like(words_CV))
    u_CV = words_CV.bitwise_and_(2**31 - 1).to(torch.float32).add_(0.5).mul_(2**-31)
    u_CV.clamp_(max=1 - 2**-24)  # the last ones round to 1, of which the logarithm is none
    return u_CV.neg_().log1p_().neg_().log_().neg_()
