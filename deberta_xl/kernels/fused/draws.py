"""The masks of `dropout.py` inside a Triton kernel, bit for bit.

Those of attention's probabilities follow from (seed, document, head, query, key) alone, those of states from (seed,
row, column), so no tiling, packing or rank is in them.

Shape suffixes of this file:
    I queries of a tile   J keys of a tile   P pairs of columns, which share a word
"""

from typing import NamedTuple

import triton
import triton.language as tl

from deberta_xl.kernels.dropout import LEVELS, DropoutRule


class Draw(NamedTuple):
    """A `DropoutRule` as kernels read it.

    The seed comes as floats of 16 bits each, lowest ones first: for an integer that 16 divides, or a 1, Triton compiles
    a kernel anew, and seeds are other ones at every call.
    """

    seed_0: float
    seed_1: float
    seed_2: float
    seed_3: float
    first_head: int
    lowest_kept: int
    """Of signed numbers whose upper half is an element's draw, the lowest that keeps it."""
    scale: float
    """Of what is kept."""


def draw_of(rule: DropoutRule) -> Draw:
    """The numbers of a rule that has a seed, or drops nothing."""
    parts = [float((rule.seed or 0) >> shift & 0xFFFF) for shift in (0, 16, 32, 48)]
    return Draw(*parts, rule.first_head, (rule.dropped_levels - LEVELS // 2) << 16, rule.scale)


@triton.jit
def join_halves(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """A number of 32 bits of two of 16."""
    return tl.cast(low, tl.uint32) | (tl.cast(high, tl.uint32) << 16)


@triton.jit
def hash_word(x: tl.tensor) -> tl.tensor:
    """The finaliser lowbias32, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def draw_rows(draw: Draw, document: tl.tensor, head: tl.tensor, i: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(start, stride) of the words of each query, whose positions in the document are `i`."""
    a = hash_word(join_halves(draw.seed_0, draw.seed_1) + document.to(tl.uint32) * 0x9E3779B9)
    b = hash_word(a + (head + draw.first_head).to(tl.uint32) * 0x85EBCA6B)
    start_I = hash_word(b + i.to(tl.uint32))
    return start_I, 2 * hash_word(join_halves(draw.seed_2, draw.seed_3) + start_I) + 1


@triton.jit
def is_kept(
    draw: Draw, document: tl.tensor, head: tl.tensor, i: tl.tensor, j0: tl.tensor, block: tl.constexpr
) -> tl.tensor:
    """Which pairs of a tile stay, bool [I, J]; its keys begin at `j0`, a multiple of its size."""
    start_I, stride_I = draw_rows(draw, document, head, i)
    j = tl.arange(0, block)
    # A word is two keys' draw. That both ask for the same one is plain here, so that it is computed once.
    word_IJ = hash_word(start_I[:, None] + ((j0 >> 1) + (j >> 1)).to(tl.uint32)[None, :] * stride_I[:, None])
    upper_IJ = tl.where((j & 1)[None, :] == 0, word_IJ << 16, word_IJ)
    return upper_IJ.to(tl.int32, bitcast=True) >= draw.lowest_kept


@triton.jit
def is_kept_column(
    draw: Draw, row: tl.tensor, width: tl.tensor, first_pair: tl.tensor, pairs: tl.constexpr
) -> tl.tensor:
    """Which columns of a numbered row (int64) of states stay, bool: those of `pairs` pairs from `first_pair` on."""
    pair_P = first_pair + tl.arange(0, pairs)
    number_P = (row * ((width + 1) // 2) + pair_P).to(tl.uint32)
    stride = 2 * join_halves(draw.seed_2, draw.seed_3) + 1
    word_P = hash_word(number_P * stride + join_halves(draw.seed_0, draw.seed_1))
    half_P2 = tl.reshape(tl.join(word_P << 16, word_P), [2 * pairs])
    return half_P2.to(tl.int32, bitcast=True) >= draw.lowest_kept
