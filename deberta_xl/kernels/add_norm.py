"""LayerNorm(residual + dropout(x)), which closes both halves of a layer: on a GPU in one pass over the states.

Shape suffixes of this file:
    W width of a state
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.kernels.dropout import DropoutRule, drop, keep_mask, row_numbers
from deberta_xl.kernels.registry import has_triton


def add_norm(
    x: Tensor, residual: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float, rule: DropoutRule, row: Tensor | None
) -> Tensor:
    """The normalised sum of `residual` and what the rule leaves of `x`, both [..., W].

    `row` has the number of each state, [...], as in `drop`; in order when absent.
    """
    is_keyed = rule.rate == 0 or rule.seed is not None
    if x.is_cuda and x.dtype != torch.float64 and is_keyed and has_triton():
        from deberta_xl.kernels.fused.drop import add_norm_states

        return add_norm_states(x, residual, weight_W, bias_W, eps, rule, row)
    return F.layer_norm(added(x, residual, rule, row), weight_W.shape, weight_W, bias_W, eps)


def added(x: Tensor, residual: Tensor, rule: DropoutRule, row: Tensor | None) -> Tensor:
    """`residual + drop(x, rule, row)`."""
    if rule.rate == 0 or rule.seed is None:
        return residual + drop(x, rule, row)
    return SumWithDropped.apply(x, residual, rule, row_numbers(x) if row is None else row)


class SumWithDropped(torch.autograd.Function):
    """The sum, made and differentiated in place as far as it goes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, rule: DropoutRule, row: Tensor) -> Tensor:
        """The mask is kept, a byte for each element."""
        mask = keep_mask(row, x.shape[-1], rule)
        ctx.save_for_backward(mask)
        ctx.scale = rule.scale
        return mask.to(x.dtype).mul_(x).mul_(rule.scale).add_(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The residual's is that of the sum."""
        (mask,) = ctx.saved_tensors
        return mask.to(gradient.dtype).mul_(gradient).mul_(ctx.scale), gradient, None, None
