"""Dropout whose masks are a function of a seed and of places, by a counter.

An element stays or goes by 16 bits of a hash of (seed, number of its row, its column). So whoever computes the element
draws the same for it: another rank, another tile, a recomputation, a CPU or a GPU; and nothing random is state. The
hash is 32-bit integer arithmetic, the same in any language:

    x = (row · ⌈width / 2⌉ + ⌊column / 2⌋) · (2 · (seed >> 32) + 1) + seed      # modulo 2³², as everything here
    x = (x ^ x >> 16) · 0x7feb352d                                             # >> brings in zeros
    x = (x ^ x >> 15) · 0x846ca68b
    x =  x ^ x >> 16                           # the lower half is the even column's, the upper half the odd one's

(a Weyl sequence behind the finaliser lowbias32 of github.com/skeeto/hash-prospector). The element goes when its half,
as a signed number, is among the lowest `rate` · 2¹⁶. On a CPU this takes less time than torch's generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16
"""Rates are rounded to a multiple of 1 / LEVELS, and the scale follows the rounded one."""
WORDS_IN_CACHE = 2**15
"""Words hashed at once on a core: both buffers stay in its cache."""


class DropoutRule(NamedTuple):
    """Which elements are dropped."""

    rate: float = 0.0
    """Share that is zeroed, while the rest is scaled; 0, as in evaluation, drops nothing."""
    seed: int | None = None
    """63 bits of which the mask is a function; None draws from torch's global generator."""
    first_head: int = 0
    """For attention probabilities: the number of this rank's first head among all heads."""

    @property
    def dropped_levels(self) -> int:
        """Of LEVELS values, those that drop."""
        return min(round(self.rate * LEVELS), LEVELS - 1)


def drop(x: Tensor, rule: DropoutRule, row: Tensor | None = None) -> Tensor:
    """`x` with the mask of `rule`. `row` has the number of each row, [*x.shape[:-1]]; in order when absent."""
    if rule.rate == 0:
        return x
    if rule.seed is None:
        return F.dropout(x, rule.rate)
    if row is None:
        row = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
    return (x * keep_mask(row, x.shape[-1], rule)).mul_(LEVELS / (LEVELS - rule.dropped_levels))


def keep_mask(row: Tensor, width: int, rule: DropoutRule) -> Tensor:
    """Which elements of rows (int64 numbers) stay, bool [*row.shape, width]."""
    assert rule.seed is not None
    num_words = -(-width // 2)
    stride = 2 * (rule.seed >> 32) + 1
    # Integers wrap around: what is said modulo 2**32 may be computed modulo 2**64 first.
    first_R1 = (row.reshape(-1, 1) * (num_words * stride) + rule.seed).to(torch.int32)
    step_W = (torch.arange(num_words, device=row.device) * stride).to(torch.int32)
    lowest = rule.dropped_levels - LEVELS // 2
    kept_RW = torch.empty(len(first_R1), width, dtype=torch.bool, device=row.device)
    at_once = len(first_R1)
    if row.device.type == "cpu":
        at_once = max(1, WORDS_IN_CACHE * torch.get_num_threads() // max(1, num_words))
    x_CW = torch.empty(min(at_once, len(first_R1)), num_words, dtype=torch.int32, device=row.device)
    shifted_CW = torch.empty_like(x_CW)
    for start in range(0, len(first_R1), max(1, at_once)):
        chunk_C1, kept_CW = first_R1[start : start + at_once], kept_RW[start : start + at_once]
        x, shifted = x_CW[: len(chunk_C1)], shifted_CW[: len(chunk_C1)]
        torch.add(chunk_C1, step_W, out=x)
        hash_words(x, shifted)
        torch.ge(x.view(torch.int16)[:, :width], lowest, out=kept_CW)
    return kept_RW.view(*row.shape, width)


def hash_words(x: Tensor, shifted: Tensor) -> None:
    """The hash of int32 words, in place; `shifted` is room of the same shape."""
    torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)  # int32's shift brings in the sign
    x.bitwise_xor_(shifted).mul_(signed(0x7FEB352D))
    torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(shifted).mul_(signed(0x846CA68B))
    torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    x.bitwise_xor_(shifted)


def signed(word: int) -> int:
    """The 32 bits as torch's int32 has them."""
    return word - 2**32 if word >= 2**31 else word
