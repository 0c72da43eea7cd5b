"""Dropout whose masks are a function of a seed and of places, by a counter.

An element stays or goes by 16 bits of a hash of the seed and of where it is. So whoever computes the element draws the
same for it: another rank, another tile, a recomputation, a CPU or a GPU; and nothing random is state. The hash is
32-bit integer arithmetic, the same in any language (a Weyl sequence behind the finaliser lowbias32 of
github.com/skeeto/hash-prospector):

    f(x):  x = (x ^ x >> 16) · 0x7feb352d                                # modulo 2³², as everything here;
           x = (x ^ x >> 15) · 0x846ca68b                                # >> brings in zeros
           x =  x ^ x >> 16

Of states, an element is a column of a numbered row:

    word   = f((row · ⌈width / 2⌉ + ⌊column / 2⌋) · (2 · (seed >> 32) + 1) + seed)

Of attention's probabilities, it is the pair of query i and key j, as counted in their document, of a head (its number
among all heads) and a document (its number in the micro-batch, row by row, without padding). So a document has the
same masks however documents are packed, padded, or divided over ranks and tiles:

    a      = f(seed + document · 0x9e3779b9)
    b      = f(a + head · 0x85ebca6b)
    start  = f(b + i)
    stride = 2 · f((seed >> 32) + start) + 1
    word   = f(start + ⌊j / 2⌋ · stride)

The lower half of a word is the even column's or key's, the upper half the odd one's. The element goes when its half,
as a signed number, is among the lowest `rate` · 2¹⁶. On a CPU this takes less time than torch's generator.

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   N heads on this rank   R rows   W words or columns   C rows of a chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.kernels.registry import has_triton

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

    @property
    def scale(self) -> float:
        """What stays is multiplied by it."""
        return LEVELS / (LEVELS - self.dropped_levels)

    def with_seed(self) -> DropoutRule:
        """The same, its seed drawn from torch's global generator where it has none."""
        return self if self.seed is not None else self._replace(seed=int(torch.randint(2**63 - 1, ())))


class Places(NamedTuple):
    """Where the queries of pairs stand, int64 [B, S] each."""

    document: Tensor
    """Number of the query's document in the micro-batch."""
    position: Tensor
    """Of the query in its document (i)."""
    start: Tensor | None = None
    """Column at which the document starts, where its key 0 is; None where all start at column 0."""


def drop(x: Tensor, rule: DropoutRule, row: Tensor | None = None) -> Tensor:
    """`x` with the mask of `rule`. `row` has the number of each row, [*x.shape[:-1]]; in order when absent."""
    if rule.rate == 0:
        return x
    if rule.seed is None:
        return F.dropout(x, rule.rate)
    if x.is_cuda and x.dtype != torch.float64 and has_triton():
        from deberta_xl.kernels.fused.drop import drop_states

        return drop_states(x, rule, row)
    if row is None:
        row = row_numbers(x)
    return (x * keep_mask(row, x.shape[-1], rule)).mul_(rule.scale)


def row_numbers(x: Tensor) -> Tensor:
    """The number of each row of `x` in order, int64 [*x.shape[:-1]]."""
    return torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])


def keep_mask(row: Tensor, width: int, rule: DropoutRule) -> Tensor:
    """Which elements of rows (int64 numbers) stay, bool [*row.shape, width]."""
    assert rule.seed is not None
    stride = 2 * (rule.seed >> 32) + 1
    # Integers wrap around: what is said modulo 2**32 may be computed modulo 2**64 first.
    first_R1 = (row.reshape(-1, 1) * (-(-width // 2) * stride) + rule.seed).to(torch.int32)
    stride_11 = torch.full((1, 1), signed(stride % 2**32), dtype=torch.int32, device=row.device)
    return keep_rows(first_R1, stride_11, width, rule).view(*row.shape, width)


def keep_pairs(places: Places, num_heads: int, num_keys: int, rule: DropoutRule) -> Tensor:
    """Which pairs of queries with `num_keys` keys stay, bool [B, N, S, T].

    Column 0 of T is the row's; what a query's document does not have is drawn, too, and means nothing.
    """
    return keep_pair_rows(*pair_rows(places, num_heads, rule), places.start, num_keys, rule)


def keep_pair_rows(
    first_BNS: Tensor, stride_BNS: Tensor, start_BS: Tensor | None, num_keys: int, rule: DropoutRule
) -> Tensor:
    """`keep_pairs` of what `pair_rows` gives, for any of the queries; `start_BS` as in their `Places`."""
    is_odd_R1 = None
    if start_BS is not None:
        # A word begins at the row's column 0 where the document starts at an even column, else one column before it.
        start_B1S = start_BS.to(torch.int32).unsqueeze(1)
        first_BNS = first_BNS - ((start_B1S + 1) >> 1) * stride_BNS
        is_odd_B1S = (start_B1S & 1).bool()
        if start_BS.device.type != "cpu" or is_odd_B1S.any():  # to look would be to wait, elsewhere
            is_odd_R1 = is_odd_B1S.expand_as(first_BNS).reshape(-1, 1)
    kept_RT = keep_rows(first_BNS.reshape(-1, 1), stride_BNS.reshape(-1, 1), num_keys, rule, is_odd_R1)
    return kept_RT.view(*first_BNS.shape, num_keys)


def pair_rows(places: Places, num_heads: int, rule: DropoutRule) -> tuple[Tensor, Tensor]:
    """`start` and `stride` of every query's row of pairs, int32 [B, N, S] each."""
    assert rule.seed is not None
    head_N1 = torch.arange(rule.first_head, rule.first_head + num_heads, device=places.document.device).unsqueeze(1)
    document_B1S = places.document.unsqueeze(1)
    x = hashed(document_B1S * 0x9E3779B9 + rule.seed)
    x = hashed(x + head_N1 * 0x85EBCA6B)
    first_BNS = hashed(x + places.position.unsqueeze(1))
    return first_BNS, hashed(first_BNS + (rule.seed >> 32)).mul_(2).add_(1)


def hashed(x: Tensor) -> Tensor:
    """f of integers, int32."""
    x = x.to(torch.int32)
    hash_words(x, torch.empty_like(x))
    return x


def keep_rows(
    first_R1: Tensor, stride_R1: Tensor, width: int, rule: DropoutRule, is_odd_R1: Tensor | None = None
) -> Tensor:
    """Which elements stay of rows whose words are f(first + k · stride), k = 0, 1, …; bool [R, W].

    Rows that are odd begin with the second half of their first word.
    """
    num_rows, num_words = len(first_R1), -(-(width if is_odd_R1 is None else width + 1) // 2)
    lowest = rule.dropped_levels - LEVELS // 2
    at_once = num_rows
    if first_R1.device.type == "cpu":
        at_once = max(1, WORDS_IN_CACHE * torch.get_num_threads() // num_words)
    word_W = torch.arange(num_words, dtype=torch.int32, device=first_R1.device)
    kept_RW = torch.empty(num_rows, width, dtype=torch.bool, device=first_R1.device)
    x_CW = first_R1.new_empty(min(at_once, num_rows), num_words)
    shifted_CW = torch.empty_like(x_CW)
    for start in range(0, num_rows, max(1, at_once)):
        chunk = slice(start, start + at_once)
        kept_CW = kept_RW[chunk]
        x, shifted = x_CW[: len(kept_CW)], shifted_CW[: len(kept_CW)]
        torch.mul(stride_R1.expand_as(first_R1)[chunk], word_W, out=x).add_(first_R1[chunk])
        hash_words(x, shifted)
        # Compared in place and then converted: a comparison that writes bool takes several times as long on a CPU.
        stays_CW = x.view(torch.int16).ge_(lowest)
        if is_odd_R1 is not None:
            following_CW = (stays_CW[:, 1:] - stays_CW[:, :-1]).mul_(is_odd_R1[chunk].to(torch.int16))
            stays_CW = stays_CW[:, :-1].add_(following_CW)
        kept_CW.copy_(stays_CW[:, :width])
    return kept_RW


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
