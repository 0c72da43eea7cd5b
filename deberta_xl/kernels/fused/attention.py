"""Disentangled attention in fused kernels for GPUs, written in Triton: nothing quadratic is kept, nothing gathered.

For the backward pass it keeps queries, keys, values, context, log-sum-exp and a row of the projected tables for each
offset within the reach. While that is at work the gradients of near tiles' scores live besides (`tiles.py`): as wide as
the reach, however long the rows are. Every sum has one order, so that a run repeats itself bit for bit; those of tables
are float32.

Shape suffixes of this file:
    B batch   S queries   T keys   L all positions, or all queries   N heads on this rank   H head size
    R relative rows (2k)   O offsets
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels import reference
from deberta_xl.kernels.contract import Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.fused.blocks import Backward, Given, Outcome
from deberta_xl.kernels.fused.forward import far_forward_kernel, forward_kernel
from deberta_xl.kernels.fused.gradients import far_key_kernel, far_query_kernel, key_kernel, query_kernel, value_kernel
from deberta_xl.kernels.fused.offsets import runs_of_rows
from deberta_xl.kernels.fused.plan import Plan, make_plan
from deberta_xl.kernels.fused.rows import inner_kernel, parts_kernel, saturated_gradients_kernel
from deberta_xl.kernels.fused.tables import SPLITS, expand_table, fold_kernel, table_gradients_kernel

SPLITS_OF_ROWS = 16
"""Programs that share the rows of a head where a sum is over all of them; each leaves a sum of its own."""


def attention(query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Tensor:
    """The contract's `Attend`, on a GPU.

    Of several queries with one position the first is computed; the others, which fill up a choice, get zeros. A mask of
    pairs is dense already, and the reference's business. Raises ConfigError for tensors that no GPU has, and for a type
    of numbers that the kernels do not read.
    """
    if not query_BNSH.is_cuda and not triton.knobs.runtime.interpret:
        raise ConfigError(
            f"model.kernel=fused computes on a GPU, the model is on {query_BNSH.device.type}; choose model.kernel=auto"
        )
    if where.mask_BST is not None:
        return reference.attention(query_BNSH, memory, relative, where, dropout)
    plan = make_plan(query_BNSH, relative, where, dropout.with_seed() if dropout.rate else dropout)
    rows = (table_NRH if table_NRH is None else table_NRH.to(query_BNSH.dtype) for table_NRH in relative)
    tokens = (x_BNLH.transpose(1, 2).flatten(0, 1).contiguous() for x_BNLH in (query_BNSH, *memory))
    context_LNH = FusedAttention.apply(*tokens, *rows, plan)
    return context_LNH.view(len(query_BNSH), -1, *context_LNH.shape[1:]).transpose(1, 2)


class FusedAttention(torch.autograd.Function):
    """Of tokens, one after the other: queries [L, N, H], keys and values, tables [N, R, H] or None."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_LNH: Tensor,
        key_LNH: Tensor,
        value_LNH: Tensor,
        key_NRH: Tensor | None,
        query_NRH: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        """The context [L, N, H] of the queries; zeros where there is none."""
        num_heads = query_LNH.shape[1]
        context_LNH = torch.zeros_like(query_LNH)
        log_sum_NL = query_LNH.new_full((num_heads, len(query_LNH)), torch.inf, dtype=torch.float32)
        far = (query_LNH, query_LNH)
        if plan.form.has_far:
            shapes = (query_LNH.shape, (2, *log_sum_NL.shape))
            far = tuple(query_LNH.new_empty(shape, dtype=torch.float32) for shape in shapes)
        outcome = Outcome(context_LNH, log_sum_NL, *far)
        with torch.cuda.device_of(query_LNH):
            given = read_tables(query_LNH, key_LNH, value_LNH, key_NRH, query_NRH, plan)
            if plan.form.has_far:
                plan.launch(far_forward_kernel, "far_forward", num_heads, given, outcome)
            plan.launch(forward_kernel, "forward", num_heads, given, outcome)
        ctx.save_for_backward(*given, context_LNH, log_sum_NL)
        ctx.plan = plan
        return context_LNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient_LNH: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all that `forward` was given."""
        *given_tensors, context_LNH, log_sum_NL = ctx.saved_tensors
        given, plan = Given(*given_tensors), ctx.plan
        num_heads = context_LNH.shape[1]
        with torch.cuda.device_of(context_LNH):
            backward = begin_backward(gradient_LNH.contiguous(), log_sum_NL, given, plan)
            launch_rows(inner_kernel, plan, context_LNH, backward.gradient, backward.inner)
            if plan.form.has_far:
                plan.launch(far_query_kernel, "far_query", num_heads, given, backward)
                plan.launch(far_key_kernel, "far_key", num_heads, given, backward)
            for kernel, name in ((value_kernel, "value"), (key_kernel, "key"), (query_kernel, "query")):
                plan.launch(kernel, name, num_heads, given, backward)
            tables = (
                table_gradient(of_keys, given, backward, plan) if is_used else None
                for of_keys, is_used in enumerate(
                    (plan.form.has_content_to_position, plan.form.has_position_to_content)
                )
            )
            return backward.query_gradient, backward.key_gradient, backward.value_gradient, *tables, None


def read_tables(
    query_LNH: Tensor, key_LNH: Tensor, value_LNH: Tensor, key_NRH: Tensor | None, query_NRH: Tensor | None, plan: Plan
) -> Given:
    """With the tables by offset, and what they give far from their middle; anything where a term is not used."""
    tables, parts = [], []
    row_O, _ = runs_of_rows(plan.length, plan.buckets, plan.form.block, query_LNH.device)
    for table_NRH, x_LNH in ((key_NRH, query_LNH), (query_NRH, key_LNH)):
        expanded_NOH = part = x_LNH
        if table_NRH is not None:
            expanded_NOH = expand_table(table_NRH, row_O, plan.form.width)
            if plan.offsets.has_far:
                part = x_LNH.new_empty(2, *x_LNH.shape[1::-1], dtype=torch.float32)
                launch_rows(parts_kernel, plan, x_LNH, expanded_NOH, part, sizes=plan.sizes)
        tables.append(expanded_NOH)
        parts.append(part)
    return Given(query_LNH, key_LNH, value_LNH, *tables, *parts)


def launch_rows(kernel: Any, plan: Plan, rows_LNH: Tensor, *arguments: Tensor, **named: Any) -> None:
    """A kernel that has a program for some rows of a tensor and each head."""
    num_rows, num_heads = rows_LNH.shape[:2]
    grid = (triton.cdiv(num_rows, plan.form.block), num_heads)
    kernel[grid](rows_LNH, *arguments, num_rows=num_rows, form=plan.form, **named)


def begin_backward(gradient_LNH: Tensor, log_sum_NL: Tensor, given: Given, plan: Plan) -> Backward:
    """Room for what the kernels hand to one another and leave; what they may leave out is zero."""
    query_LNH, key_LNH = given.query, given.key
    num_heads = key_LNH.shape[1]
    tiles = query_LNH.new_empty(num_heads, plan.offsets.near, plan.sizes.num_keys, plan.form.block)
    far = (query_LNH, key_LNH, key_LNH, key_LNH, query_LNH)
    if plan.offsets.has_far:
        shares = (torch.empty_like(x_LNH, dtype=torch.float32) for x_LNH in (query_LNH, key_LNH, key_LNH))
        parts = (key_LNH.new_zeros(2, num_heads, len(x_LNH), dtype=torch.float32) for x_LNH in (key_LNH, query_LNH))
        far = (*shares, *parts)
    gradients = map(torch.zeros_like, (query_LNH, key_LNH, given.value))
    return Backward(gradient_LNH, log_sum_NL, torch.empty_like(log_sum_NL), tiles, *far, *gradients)


def table_gradient(of_keys: int, given: Given, backward: Backward, plan: Plan) -> Tensor:
    """The gradient [N, R, H] of the table that queries are multiplied with, or keys: from near tiles by
    chunks of offsets, from far ones by the rows that those share."""
    gradient_NRH = near_gradient(of_keys, given, backward, plan)
    if plan.offsets.has_far:
        rows_LNH, part_2NL = (given.key, backward.far_key_part) if of_keys else (given.query, backward.far_query_part)
        ends_2NH = far_gradient(rows_LNH, part_2NL, plan)
        gradient_NRH[:, plan.offsets.first_row] += ends_2NH[0]
        gradient_NRH[:, plan.offsets.last_row] += ends_2NH[1]
    return gradient_NRH.to(given.key.dtype)


def near_gradient(of_keys: int, given: Given, backward: Backward, plan: Plan) -> Tensor:
    """What near tiles give to a table, float32 [N, R, H]."""
    form, num_heads, num_rows = plan.form, given.key.shape[1], 2 * plan.buckets.span
    num_offsets = 2 * plan.offsets.center  # in whole chunks
    by_offset = given.key.new_empty(SPLITS, num_heads, num_offsets, form.width, dtype=torch.float32)
    table_gradients_kernel[(num_offsets // form.block, num_heads, SPLITS)](
        given, backward, by_offset, plan.items, plan.sizes, plan.draw, of_keys, form,
        **plan.launches["tables"]._asdict(),
    )  # fmt: skip
    _, first_R = runs_of_rows(plan.length, plan.buckets, form.block, given.key.device)
    gradient_NRH = given.key.new_empty(num_heads, num_rows, form.head_size, dtype=torch.float32)
    fold_kernel[(num_rows, num_heads)](by_offset, first_R, gradient_NRH, num_offsets, form, SPLITS)
    return gradient_NRH


def far_gradient(rows_LNH: Tensor, part_2NL: Tensor, plan: Plan) -> Tensor:
    """What far tiles give to the first and the last row of a table, float32 [2, N, H]."""
    num_rows, num_heads, head_size = rows_LNH.shape
    by_split = rows_LNH.new_empty(SPLITS_OF_ROWS, 2, num_heads, head_size, dtype=torch.float32)
    saturated_gradients_kernel[(SPLITS_OF_ROWS, num_heads)](rows_LNH, part_2NL, by_split, num_rows, plan.form)
    return by_split.sum(0)
