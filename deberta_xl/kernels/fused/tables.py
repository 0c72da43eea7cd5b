"""The relative tables by offset: expanded to one row each for the kernels, and their gradients back to the tables.

A row of the table serves a run of offsets, since δ never falls as i − j grows. So sums over a row's offsets are sums
over a run, in order.

Shape suffixes of this file:
    N heads on this rank   R relative rows (2k)   O offsets   H head size   K offsets of a chunk
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from deberta_xl.kernels.fused.blocks import (
    TABLE_SCALE,
    Backward,
    Given,
    Sizes,
    Work,
    find_work,
    key_block,
    load_rows,
    query_block,
    zero_rows,
)
from deberta_xl.kernels.fused.draws import Draw
from deberta_xl.kernels.fused.shear import as_operand, slide, unshear_keys
from deberta_xl.kernels.fused.tiles import keys_of, load_tile, queries_of
from deberta_xl.kernels.fused.work_items import WorkItems

SPLITS = 4
"""Programs that share the work items of a chunk of offsets; each leaves a sum of its own."""
OFFSETS_AT_ONCE: tl.constexpr = tl.constexpr(8)


def expand_table(table_NRH: Tensor, row_O: Tensor, width: int) -> Tensor:
    """One row for each offset, times TABLE_SCALE, [N, O, width]."""
    expanded_NOH = table_NRH.index_select(1, row_O).mul_(TABLE_SCALE)
    return F.pad(expanded_NOH, (0, width - table_NRH.shape[-1])) if width > table_NRH.shape[-1] else expanded_NOH


@triton.jit
def table_gradients_kernel(
    given: Given, backward: Backward, by_offset: tl.tensor, items: WorkItems, sizes: Sizes, draw: Draw,
    of_keys: tl.constexpr, form: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of a chunk's rows, [splits, N, O, H], float32: of the table that queries are multiplied with, or
    (`of_keys`) keys.

    A program for a chunk, a head and a split of the work items, which it adds up in order.
    """
    chunk, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = chunk * form.block - sizes.center
    sum_KH = zero_rows(form)
    for item in range(split, tl.load(items.count), tl.num_programs(2)):
        first, work = find_work(items, sizes, draw, item)
        if of_keys:
            sum_KH = add_keys_of_chunk(sum_KH, first, offset, given, backward, work, form)
        else:
            sum_KH = add_queries_of_chunk(sum_KH, first, offset, given, backward, work, form)
    number_K = chunk * form.block + tl.arange(0, form.block)
    row_K = (split * tl.num_programs(1) + head) * tl.num_programs(0) * form.block + number_K
    tl.store(by_offset + row_K[:, None] * form.width + tl.arange(0, form.width)[None, :], sum_KH * sizes.scale)


@triton.jit
def add_queries_of_chunk(
    sum_KH: tl.tensor, i0: tl.tensor, offset: tl.tensor, given: Given, backward: Backward, work: Work,
    form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """With a block of queries: the two tiles that have its offsets from `offset` on."""
    left, right, _end = keys_of(i0, work, form)
    j0 = i0 - offset
    if (j0 >= left) & (j0 <= right):
        queries, keys = query_block(i0, work, form), key_block(j0, work, form)
        keys_before = key_block(j0 - form.block, work, form)
        before = load_tile(backward.tiles, queries, keys_before, j0 > left, work, form)
        tile = load_tile(backward.tiles, queries, keys, j0 < right, work, form)
        q_IH = load_rows(given.query, queries, work.head, form)
        ds_KI = as_operand(slide(before, tile, form.block, False), form.block).to(q_IH.dtype)
        sum_KH = tl.dot(ds_KI, q_IH, sum_KH, input_precision=form.precision)
    return sum_KH


@triton.jit
def add_keys_of_chunk(
    sum_KH: tl.tensor, j0: tl.tensor, offset: tl.tensor, given: Given, backward: Backward, work: Work,
    form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The same with a block of keys."""
    _begin, top, bottom, _end = queries_of(j0, work, form)
    i0 = j0 + offset + form.block
    if (i0 >= top) & (i0 <= bottom):
        queries, keys = query_block(i0, work, form), key_block(j0, work, form)
        queries_before = query_block(i0 - form.block, work, form)
        before = load_tile(backward.tiles, queries_before, keys, i0 > top, work, form)
        tile = load_tile(backward.tiles, queries, keys, i0 < bottom, work, form)
        k_JH = load_rows(given.key, keys, work.head, form)
        ds_KJ = as_operand(unshear_keys(before, tile, form.block, False), form.block).to(k_JH.dtype)
        sum_KH = tl.dot(ds_KJ, k_JH, sum_KH, input_precision=form.precision)
    return sum_KH


@triton.jit
def fold_kernel(
    by_offset: tl.tensor, first_R: tl.tensor, gradient: tl.tensor, num_offsets: tl.tensor, form: tl.constexpr,
    splits: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient [N, R, H] of a table, float32: the sum over each row's offsets and their splits.

    A program for a row and a head. The last offset of an expanded table is in no chunk, and no pair has it.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, form.width)
    end = tl.minimum(tl.load(first_R + row + 1), num_offsets)
    sum_OH = tl.full([OFFSETS_AT_ONCE, form.width], 0.0, tl.float32)
    for number in range(tl.load(first_R + row), end, OFFSETS_AT_ONCE):
        number_O = number + tl.arange(0, OFFSETS_AT_ONCE)
        for split in tl.static_range(splits):
            place_O = (split * tl.num_programs(1) + head) * num_offsets + number_O
            pointer = by_offset + place_O[:, None] * form.width + h[None, :]
            sum_OH += tl.load(pointer, mask=(number_O < end)[:, None], other=0.0)
    pointer = gradient + (head * tl.num_programs(0) + row) * form.head_size + h
    tl.store(pointer, tl.sum(sum_OH, 0), mask=h < form.head_size)
