"""Kernels of rows alone, without pairs: products of each row with another one, and sums over rows.

Shape suffixes of this file:
    I rows of a program   H head size, padded to a power of two
"""

import triton.language as tl
from triton import jit

from deberta_xl.kernels.fused.blocks import RESTORED, Block, Sizes, load_rows, load_saturated_row, numbers_of, zero_rows


@jit
def rows_at(first: tl.tensor, num_rows: tl.tensor, form: tl.constexpr) -> Block:
    """Rows from `first` on, of a tensor that has `num_rows`."""
    row_I = first + tl.arange(0, form.block)
    return Block(0, row_I, 0, row_I.to(tl.int64), row_I < num_rows)


@jit
def inner_kernel(
    context: tl.tensor, gradient: tl.tensor, inner: tl.tensor, num_rows: tl.tensor, form: tl.constexpr
) -> None:
    """Each query's product of context and gradient, [N, rows]."""
    head = tl.program_id(1)
    block = rows_at(tl.program_id(0) * form.block, num_rows, form)
    context_IH = load_rows(context, block, head, form).to(tl.float32)
    gradient_IH = load_rows(gradient, block, head, form).to(tl.float32)
    pointers_I = numbers_of(inner, 0, block, num_rows, head)
    tl.store(pointers_I, tl.sum(context_IH * gradient_IH, 1), mask=block.is_there_I)


@jit
def parts_kernel(
    rows: tl.tensor, table: tl.tensor, parts: tl.tensor, num_rows: tl.tensor, sizes: Sizes, form: tl.constexpr
) -> None:
    """Products of each row of [rows, N, H] with the first and the last row of its head's table, [2, N, rows]."""
    head = tl.program_id(1)
    block = rows_at(tl.program_id(0) * form.block, num_rows, form)
    x_IH = load_rows(rows, block, head, form).to(tl.float32)
    for side in tl.static_range(2):
        row_H = load_saturated_row(table, side, head, sizes, form) * RESTORED
        pointers_I = numbers_of(parts, side, block, num_rows, head)
        tl.store(pointers_I, tl.sum(x_IH * row_H[None, :], 1), mask=block.is_there_I)


@jit
def saturated_gradients_kernel(
    rows: tl.tensor, parts: tl.tensor, gradient: tl.tensor, num_rows: tl.tensor, form: tl.constexpr
) -> None:
    """The gradient of the first and the last row of each head's table, [splits, 2, N, H], float32: the sum over all
    rows of [rows, N, H], with the gradients of their products.

    A program for a head and a split of the rows, which it adds up in order.
    """
    split, head = tl.program_id(0), tl.program_id(1)
    sum_IH, other_IH = zero_rows(form), zero_rows(form)
    for first in range(split * form.block, num_rows, tl.num_programs(0) * form.block):
        block = rows_at(first, num_rows, form)
        x_IH = load_rows(rows, block, head, form).to(tl.float32)
        # Padding, which counts with a factor of 0, may hold anything.
        part_I = tl.load(numbers_of(parts, 0, block, num_rows, head), mask=block.is_there_I, other=0.0)
        sum_IH += tl.where((part_I != 0.0)[:, None], x_IH * part_I[:, None], 0.0)
        part_I = tl.load(numbers_of(parts, 1, block, num_rows, head), mask=block.is_there_I, other=0.0)
        other_IH += tl.where((part_I != 0.0)[:, None], x_IH * part_I[:, None], 0.0)
    h = tl.arange(0, form.width)
    pointer = gradient + (split * 2 * tl.num_programs(1) + head) * form.head_size + h
    tl.store(pointer, tl.sum(sum_IH, 0), mask=h < form.head_size)
    tl.store(pointer + tl.num_programs(1) * form.head_size, tl.sum(other_IH, 0), mask=h < form.head_size)
