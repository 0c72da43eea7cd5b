"""Sequence parallelism: between the shared parts of a layer each rank keeps a slice of the sequence.

What sums over the ranks of a tensor-parallel group would otherwise give to all of them (after the output projection and
the feed-forward block), each gets only its slice of; the slices are joined where states enter the shared parts again.
So residuals, norms and dropout are computed and kept once, not on every rank.

Tensors are [batch, sequence, …] and cut along the sequence: rank r of T has positions r·S/T … (r+1)·S/T − 1.

Shape suffixes of this file:
    B batch   S sequence   P positions of this rank's slice (S/T)   D hidden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_xl.kernels.add_norm import add_norm
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.parallel.groups import Groups

Exchange = Callable[[Tensor, Groups], Tensor]
"""What a rank has of its own, or of what all have, from what it had."""


def join_slices(x_BPD: Tensor, groups: Groups) -> Tensor:
    """The whole sequence from the ranks' slices: an all-gather."""
    size = groups.grid.tensor_parallel_size
    gathered = x_BPD.new_empty(size * x_BPD.shape[0], *x_BPD.shape[1:])
    dist.all_gather_into_tensor(gathered, x_BPD.contiguous(), group=groups.tensor_group)
    return gathered.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def sum_slices(x_BSD: Tensor, groups: Groups) -> Tensor:
    """This rank's slice of the sum over ranks: a reduce-scatter, half the cost of an all-reduce."""
    by_rank = x_BSD.unflatten(1, (groups.grid.tensor_parallel_size, -1)).transpose(0, 1).contiguous()
    slice_BPD = torch.empty_like(by_rank[0])
    dist.reduce_scatter_tensor(slice_BPD, by_rank.flatten(0, 1), group=groups.tensor_group)
    return slice_BPD


def own_slice(x_BSD: Tensor, groups: Groups) -> Tensor:
    """A copy of this rank's slice; a view would keep the whole sequence alive."""
    size, rank = groups.grid.tensor_parallel_size, groups.grid.tensor_parallel_rank
    length, remainder = divmod(x_BSD.shape[1], size)
    assert remainder == 0, f"a sequence of {x_BSD.shape[1]} does not divide over {size} ranks"
    return x_BSD.narrow(1, rank * length, length).clone(memory_format=torch.contiguous_format)


class _Exchange(torch.autograd.Function):
    """One of the functions above, and on the way back another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, there: Exchange, back: Exchange) -> Tensor:
        ctx.groups, ctx.back = groups, back
        return there(x, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.groups), None, None, None


class _SumToSlice(torch.autograd.Function):
    """Sum over ranks, keep the slice, add a bias.

    The way back joins the slices' gradients for the weights' sake, so the bias finds its whole gradient there, too, and
    needs no sum of its own.
    """

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, bias_D: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return sum_slices(x_BSD, groups) + bias_D

    @staticmethod
    def backward(ctx: Any, gradient_BPD: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient_BSD = join_slices(gradient_BPD, ctx.groups)
        return gradient_BSD, gradient_BSD.sum((0, 1)), None


class _SumGradients(torch.autograd.Function):
    """The identity of several tensors of which each rank uses its slice only; their gradients are summed at once."""

    @staticmethod
    def forward(ctx: Any, groups: Groups, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        together = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(together, group=ctx.groups.tensor_group)
        parts = together.split([g.numel() for g in gradients])
        return None, *(part.view_as(g) for part, g in zip(parts, gradients, strict=True))


def sum_to_slice(x_BSD: Tensor, bias_D: Tensor, groups: Groups) -> Tensor:
    """This rank's slice of the ranks' sum, plus `bias_D`, [B, P, D]."""
    return _SumToSlice.apply(x_BSD, bias_D, groups)


class JoinSequence(nn.Module):
    """Slices -> the whole sequence.

    `apart`: whether the ranks then compute different things of it, so that their gradients are summed on the way back;
    where they compute the same, each already has the whole gradient of its slice.
    """

    def __init__(self, groups: Groups, *, apart: bool):
        super().__init__()
        self.groups = groups
        self.back = sum_slices if apart else own_slice

    def forward(self, x_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, S, D]."""
        return _Exchange.apply(x_BPD, self.groups, join_slices, self.back)


class TakeSlice(nn.Module):
    """The whole sequence, which every rank has -> this rank's slice; on the way back all get the whole gradient."""

    def __init__(self, groups: Groups):
        super().__init__()
        self.groups = groups

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, P, D], contiguous."""
        return _Exchange.apply(x_BSD, self.groups, own_slice, join_slices)


class SliceNorm(nn.LayerNorm):
    """LayerNorm of slices. Weight and bias are on every rank; their gradients are summed over the slices, in one sum.

    That happens inside the module's own computation, not in a hook on the parameters, so every ZeRO stage sees whole
    gradients and nothing else.
    """

    def __init__(self, plain: nn.LayerNorm, groups: Groups):
        super().__init__(plain.normalized_shape, plain.eps, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.groups = groups

    def forward(self, x_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        weight, bias = _SumGradients.apply(self.groups, self.weight, self.bias)
        return nn.functional.layer_norm(x_BPD, self.normalized_shape, weight, bias, self.eps)


class SliceAddNorm(SliceNorm):
    """The same of slices' sums, with the dropout mask that the whole sequence has there."""

    def forward(self, x_BPD: Tensor, residual_BPD: Tensor, rule: DropoutRule, row: None) -> Tensor:
        """[B, P, D] both -> [B, P, D]; the rows are in order."""
        weight, bias = _SumGradients.apply(self.groups, self.weight, self.bias)
        num_sequences, length = x_BPD.shape[0], x_BPD.shape[1] * self.groups.grid.tensor_parallel_size
        row_BS = torch.arange(num_sequences * length, device=x_BPD.device).view(num_sequences, length)
        row_BP = own_slice(row_BS, self.groups)
        return add_norm(x_BPD, residual_BPD, weight, bias, self.eps, rule, row_BP)
