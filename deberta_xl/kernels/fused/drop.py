"""Dropout of states in one pass over them, alone or with what follows it at the end of a layer's halves,
LayerNorm(residual + dropout(x)): the masks of `kernels/dropout.py`, bit for bit, which nobody keeps.

What is stored is rounded where torch's operators round it, so that only the order of a row's sum differs from theirs.

Shape suffixes of this file:
    R rows   W columns   C columns of a program, a power of two
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.fused.draws import Draw, draw_of, is_kept_column

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
        return launch_drop(x, rule, row_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With the same mask."""
        (row_R,) = ctx.saved_tensors
        return launch_drop(gradient, ctx.rule, row_R), None, None


def launch_drop(x: Tensor, rule: DropoutRule, row_R: Tensor | None) -> Tensor:
    """The mask of a rule on any states."""
    x = x.contiguous()
    dropped = torch.empty_like(x)
    width = x.shape[-1]
    grid = (x.numel() // width, triton.cdiv(-(-width // 2), PAIRS))
    with torch.cuda.device_of(x):
        drop_kernel[grid](x, dropped, x if row_R is None else row_R, width, draw_of(rule), row_R is not None, PAIRS)
    return dropped


def add_norm_states(
    x: Tensor, residual: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float, rule: DropoutRule, row: Tensor | None
) -> Tensor:
    """`kernels.add_norm.add_norm` on a GPU, of a rule that drops nothing or has a seed."""
    row_R = None if row is None else row.reshape(-1)
    return NormedSum.apply(x.contiguous(), residual.contiguous(), weight_W, bias_W, eps, rule, row_R)


class NormedSum(torch.autograd.Function):
    """Of states [..., W]."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        residual: Tensor,
        weight_W: Tensor,
        bias_W: Tensor,
        eps: float,
        rule: DropoutRule,
        row_R: Tensor | None,
    ) -> Tensor:
        """The normalised sum. Kept are the sum, and the mean and inverse deviation of each row."""
        width = x.shape[-1]
        normed, summed = torch.empty_like(x), torch.empty_like(x)
        mean, inverse = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(x):
            add_norm_kernel[(x.numel() // width,)](
                x, residual, weight_W, bias_W, x if row_R is None else row_R, summed, normed, mean, inverse, width,
                eps, draw_of(rule), rule.rate > 0, row_R is not None, triton.next_power_of_2(max(2, width)),
            )  # fmt: skip
        ctx.rule = rule
        ctx.save_for_backward(summed, mean, inverse, weight_W, bias_W, row_R)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, the residual, weight and bias: torch's of the norm, and what dropout leaves of the sum's."""
        *norm, weight_W, bias_W, row_R = ctx.saved_tensors
        summed, mean, inverse = norm
        d_sum, d_weight_W, d_bias_W = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), summed, weight_W.shape, mean, inverse, weight_W, bias_W, [True, True, True]
        )
        d_x = launch_drop(d_sum, ctx.rule, row_R) if ctx.rule.rate else d_sum
        return d_x, d_sum, d_weight_W, d_bias_W, None, None, None


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
    is_kept = is_kept_column(draw, row, width, tl.program_id(1) * pairs, pairs)
    column = tl.program_id(1) * 2 * pairs + tl.arange(0, 2 * pairs)
    pointer = place * width + column
    values = tl.load(x + pointer, mask=column < width, other=0.0).to(tl.float32)
    tl.store(dropped + pointer, tl.where(is_kept, values * draw.scale, 0.0), mask=column < width)


@triton.jit
def add_norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight_W: tl.tensor, bias_W: tl.tensor, row_R: tl.tensor, summed: tl.tensor,
    normed: tl.tensor, mean_R: tl.tensor, inverse_R: tl.tensor, width: tl.tensor, eps: tl.tensor, draw: Draw,
    has_dropout: tl.constexpr, has_rows: tl.constexpr, columns: tl.constexpr,
) -> None:  # fmt: skip
    """A program for each row."""
    place = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, columns)
    is_there_C = column_C < width
    pointer_C = place * width + column_C
    x_C = tl.load(x + pointer_C, mask=is_there_C, other=0.0)
    residual_C = tl.load(residual + pointer_C, mask=is_there_C, other=0.0).to(tl.float32)
    if has_dropout:
        row = place
        if has_rows:
            row = tl.load(row_R + place)
        is_kept_C = is_kept_column(draw, row, width, 0, columns // 2)
        x_C = tl.where(is_kept_C, x_C.to(tl.float32) * draw.scale, 0.0).to(x_C.dtype)
    stored_C = (x_C.to(tl.float32) + residual_C).to(x_C.dtype)
    tl.store(summed + pointer_C, stored_C, mask=is_there_C)
    sum_C = stored_C.to(tl.float32)
    mean = tl.sum(sum_C, 0) / width
    centered_C = tl.where(is_there_C, sum_C - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered_C * centered_C, 0) / width + eps)
    tl.store(mean_R + place, mean)
    tl.store(inverse_R + place, inverse)
    weight_C = tl.load(weight_W + column_C, mask=is_there_C, other=0.0).to(tl.float32)
    bias_C = tl.load(bias_W + column_C, mask=is_there_C, other=0.0).to(tl.float32)
    tl.store(normed + pointer_C, (centered_C * inverse * weight_C + bias_C).to(x_C.dtype), mask=is_there_C)
