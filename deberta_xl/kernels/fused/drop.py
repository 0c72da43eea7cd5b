"""Dropout of states in one pass over them: the masks of `kernels/dropout.py`, bit for bit, which nobody keeps.

Shape suffixes of this file:
    R rows   W columns   P pairs of columns of a program, which share a word
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.fused.draws import Draw, draw_of, hash_word, join_halves

PAIRS = 512
"""Of a program."""


def drop_states(x: Tensor, rule: DropoutRule, row: Tensor | None) -> Tensor:
    """`kernels.dropout.drop` on a GPU, of a rule that has a seed."""
    return DroppedStates.apply(x, rule, None if row is None else row.reshape(-1))


class DroppedStates(torch.autograd.Function):
    """Of states [..., W]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rule: DropoutRule, row_R: Tensor | None) -> Tensor:
        """The states that stay, scaled, and zeros."""
        ctx.rule = rule
        ctx.save_for_backward(row_R)
        return launch(x, rule, row_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With the same mask."""
        (row_R,) = ctx.saved_tensors
        return launch(gradient, ctx.rule, row_R), None, None


def launch(x: Tensor, rule: DropoutRule, row_R: Tensor | None) -> Tensor:
    """The mask of a rule on any states."""
    x = x.contiguous()
    dropped = torch.empty_like(x)
    width = x.shape[-1]
    grid = (x.numel() // width, triton.cdiv(-(-width // 2), PAIRS))
    with torch.cuda.device_of(x):
        drop_kernel[grid](x, dropped, x if row_R is None else row_R, width, draw_of(rule), row_R is not None, PAIRS)
    return dropped


@triton.jit
def drop_kernel(
    x: tl.tensor, dropped: tl.tensor, row_R: tl.tensor, width: tl.tensor, draw: Draw, has_rows: tl.constexpr,
    pairs: tl.constexpr,
) -> None:  # fmt: skip
    """A program for some pairs of columns of a row."""
    place = tl.program_id(0).to(tl.int64)
    row = place
    if has_rows:
        row = tl.load(row_R + place)
    words_of_row = (width + 1) // 2
    pair_P = tl.program_id(1) * pairs + tl.arange(0, pairs)
    number_P = (row * words_of_row + pair_P).to(tl.uint32)
    stride = 2 * join_halves(draw.seed_2, draw.seed_3) + 1
    word_P = hash_word(number_P * stride + join_halves(draw.seed_0, draw.seed_1))
    half_P2 = tl.reshape(tl.join(word_P << 16, word_P), [2 * pairs])
    is_kept = half_P2.to(tl.int32, bitcast=True) >= draw.lowest_kept
    column = tl.program_id(1) * 2 * pairs + tl.arange(0, 2 * pairs)
    pointer = place * width + column
    values = tl.load(x + pointer, mask=column < width, other=0.0).to(tl.float32)
    tl.store(dropped + pointer, tl.where(is_kept, values * draw.scale, 0.0), mask=column < width)
