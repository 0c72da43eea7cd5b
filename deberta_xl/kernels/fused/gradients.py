"""The gradients of keys, values and queries: programs for a block of them and a head.

No two programs add to one place, so that sums have one order. `value_kernel` recomputes the scores and leaves the
gradients of the near tiles' scores in memory, which is linear in the length; dQ, dK and the tables' gradients are
products of them. Far tiles come first, in kernels of their own: at plain attention's cost, since both terms of position
are a number for each query and one for each key.

Shape suffixes of this file:
    I queries of a tile   J keys of a tile   K offsets of a chunk   H head size, padded to a power of two
"""

import triton.language as tl
from triton import jit

from deberta_xl.kernels.fused.blocks import (
    RESTORED,
    Backward,
    Block,
    Given,
    Sizes,
    Work,
    begin_sum,
    find_keys,
    find_queries,
    key_block,
    load_both,
    load_rows,
    load_saturated_row,
    numbers_of,
    query_block,
    store_rows,
    those_of_tokens,
    zero_rows,
)
from deberta_xl.kernels.fused.draws import Draw
from deberta_xl.kernels.fused.shear import as_operand, slide, unshear_keys
from deberta_xl.kernels.fused.tiles import (
    far_gradients,
    key_band,
    keys_of,
    load_chunk,
    load_tile,
    near_scores,
    no_tile,
    out_of_blocks,
    queries_of,
    query_bands,
    score_gradients,
    store_tile,
)
from deberta_xl.kernels.fused.work_items import WorkItems


@jit
def value_kernel(
    given: Given, backward: Backward, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """dV, and the gradients of the near tiles' scores."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        keys, work = find_keys(items, sizes, draw, item, form)
        j0 = keys.first
        k_JH, v_JH = load_both(given.key, given.value, keys, work.head, form)
        dv_JH = begin_sum(backward.far_value, keys, work, form)
        _begin, top, bottom, _end = queries_of(j0, work, form)
        higher_KJ = key_band(k_JH, given, top - j0 - form.block, work, form)
        for i0 in range(top, bottom, form.block):
            queries = query_block(i0, work, form)
            q_IH, g_IH = load_both(given.query, backward.gradient, queries, work.head, form)
            lower_KJ = higher_KJ  # of the tile before
            higher_KJ = key_band(k_JH, given, i0 - j0, work, form)
            lower_IK, higher_IK = query_bands(q_IH, given, i0 - j0, work, form)
            scores_IJ = near_scores(q_IH, k_JH, lower_IK, higher_IK, lower_KJ, higher_KJ, form)
            seen_IJ, ds_IJ = score_gradients(scores_IJ, g_IH, v_JH, backward, queries, keys, work, form)
            dv_JH = tl.dot(tl.trans(seen_IJ.to(g_IH.dtype)), g_IH, dv_JH, input_precision=form.precision)
            store_tile(backward.tiles, ds_IJ, queries, keys, work, form)
        store_rows(backward.value_gradient, keys, work.head, dv_JH, form)


@jit
def key_kernel(
    given: Given, backward: Backward, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """dK = dSᵀ·Q + (dS by offsets)·PQ over near tiles, and the share of the far ones."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        keys, work = find_keys(items, sizes, draw, item, form)
        dk_JH = begin_sum(backward.far_key, keys, work, form)
        by_position_JH = zero_rows(form)
        _begin, top, bottom, _end = queries_of(keys.first, work, form)
        before = no_tile(backward.tiles, form)
        for i0 in range(top, bottom, form.block):
            queries = query_block(i0, work, form)
            tile = load_tile(backward.tiles, queries, keys, True, work, form)
            q_IH = load_rows(given.query, queries, work.head, form)
            ds_JI = tl.trans(out_of_blocks(tile, form))
            dk_JH = tl.dot(ds_JI, q_IH, dk_JH, input_precision=form.precision)
            if form.has_position_to_content:
                by_position_JH = add_chunk_to_keys(
                    by_position_JH, before, tile, i0 - keys.first - form.block, given, work, form
                )
                before = tile
        if form.has_position_to_content:
            last = no_tile(backward.tiles, form)
            by_position_JH = add_chunk_to_keys(
                by_position_JH, before, last, bottom - keys.first - form.block, given, work, form
            )
        store_rows(backward.key_gradient, keys, work.head, (dk_JH + by_position_JH * RESTORED) * sizes.scale, form)


@jit
def add_chunk_to_keys(
    by_position_JH: tl.tensor, before: tl.tensor, tile: tl.tensor, offset: tl.tensor, given: Given, work: Work,
    form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """dK's part from the table, with the chunk from `offset` on, which ends before the offset of the first pair of
    `tile`; the tile `before` has the others of its offsets."""
    rows_KH = load_chunk(given.query_table, offset, work, form)
    ds_JK = as_operand(unshear_keys(before, tile, form.block, True), form.block).to(rows_KH.dtype)
    return tl.dot(ds_JK, rows_KH, by_position_JH, input_precision=form.precision)


@jit
def far_key_kernel(
    given: Given, backward: Backward, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """The shares of dV and dK that far tiles give."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        keys, work = find_keys(items, sizes, draw, item, form)
        dv_JH = zero_rows(form)
        dk_JH = zero_rows(form)
        begin, top, bottom, end = queries_of(keys.first, work, form)
        dv_JH, dk_JH = add_far_queries(dv_JH, dk_JH, begin, top, 0, given, backward, keys, work, form)
        dv_JH, dk_JH = add_far_queries(dv_JH, dk_JH, bottom, end, 1, given, backward, keys, work, form)
        store_rows(backward.far_value, keys, work.head, dv_JH, form)
        store_rows(backward.far_key, keys, work.head, dk_JH, form)


@jit
def add_far_queries(
    dv_JH: tl.tensor,
    dk_JH: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    side: tl.constexpr,
    given: Given,
    backward: Backward,
    keys: Block,
    work: Work,
    form: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """dV and dK with the queries at begin … end, of saturated offsets of one side."""
    k_JH, v_JH = load_both(given.key, given.value, keys, work.head, form)
    # As in `add_far_keys`.
    ones_I = tl.full([form.block, 16], 1.0, given.query.dtype.element_ty)
    sums_J = tl.full([form.block, 16], 0.0, tl.float32)
    for i0 in range(begin, end, form.block):
        queries = query_block(i0, work, form)
        q_IH, g_IH = load_both(given.query, backward.gradient, queries, work.head, form)
        seen_IJ, ds_IJ = far_gradients(q_IH, k_JH, g_IH, v_JH, side, given, backward, queries, keys, work, form)
        dv_JH = tl.dot(tl.trans(seen_IJ.to(g_IH.dtype)), g_IH, dv_JH, input_precision=form.precision)
        ds_JI = tl.trans(ds_IJ.to(q_IH.dtype))
        dk_JH = tl.dot(ds_JI, q_IH, dk_JH, input_precision=form.precision)
        if form.has_position_to_content:
            sums_J = tl.dot(ds_JI, ones_I, sums_J, input_precision=form.precision)
    if form.has_position_to_content:
        column_J = tl.sum(sums_J, 1) * (1 / 16)
        pointers_J = numbers_of(backward.far_key_part, side, keys, work.sizes.num_keys, work.head)
        tl.store(pointers_J, column_J * work.sizes.scale, mask=keys.is_there_I)
        row_H = load_saturated_row(given.query_table, side, work.head, work.sizes, form)
        dk_JH += column_J[:, None] * (row_H * RESTORED)[None, :]
    return dv_JH, dk_JH


@jit
def query_kernel(
    given: Given, backward: Backward, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """dQ = dS·K + (dS by offsets)·PK over near tiles, and the share of the far ones."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        queries, work = find_queries(items, sizes, draw, item, form)
        dq_IH = begin_sum(backward.far_query, queries, work, form)
        by_position_IH = zero_rows(form)
        left, right, _end = keys_of(queries.first, work, form)
        before = no_tile(backward.tiles, form)
        for j0 in range(left, right, form.block):
            keys = key_block(j0, work, form)
            tile = load_tile(backward.tiles, queries, keys, True, work, form)
            k_JH = load_rows(given.key, keys, work.head, form)
            dq_IH = tl.dot(out_of_blocks(tile, form), k_JH, dq_IH, input_precision=form.precision)
            if form.has_content_to_position:
                by_position_IH = add_chunk_to_queries(
                    by_position_IH, before, tile, queries.first - j0, given, work, form
                )
                before = tile
        if form.has_content_to_position:
            last = no_tile(backward.tiles, form)
            by_position_IH = add_chunk_to_queries(
                by_position_IH, before, last, queries.first - right, given, work, form
            )
        found = those_of_tokens(queries, work, form)
        store_rows(backward.query_gradient, found, work.head, (dq_IH + by_position_IH * RESTORED) * sizes.scale, form)


@jit
def add_chunk_to_queries(
    by_position_IH: tl.tensor, before: tl.tensor, tile: tl.tensor, offset: tl.tensor, given: Given, work: Work,
    form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """dQ's part from the table, with the chunk from `offset` on, that of the first pair of `tile`; the tile `before`
    has the others of its offsets."""
    rows_KH = load_chunk(given.key_table, offset, work, form)
    ds_IK = as_operand(slide(before, tile, form.block, True), form.block).to(rows_KH.dtype)
    return tl.dot(ds_IK, rows_KH, by_position_IH, input_precision=form.precision)


@jit
def far_query_kernel(
    given: Given, backward: Backward, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """The share of dQ that far tiles give."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        queries, work = find_queries(items, sizes, draw, item, form)
        left, right, end = keys_of(queries.first, work, form)
        dq_IH = add_far_keys(zero_rows(form), 0, left, 1, given, backward, queries, work, form)
        dq_IH = add_far_keys(dq_IH, right, end, 0, given, backward, queries, work, form)
        store_rows(backward.far_query, queries, work.head, dq_IH, form)


@jit
def add_far_keys(
    dq_IH: tl.tensor, begin: tl.tensor, end: tl.tensor, side: tl.constexpr, given: Given, backward: Backward,
    queries: Block, work: Work, form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """dQ with the keys at begin … end, of saturated offsets of one side."""
    q_IH, g_IH = load_both(given.query, backward.gradient, queries, work.head, form)
    # Summed by a product with ones, a column for each of 16: a sum over keys would take shuffles between lanes.
    ones_J = tl.full([form.block, 16], 1.0, given.query.dtype.element_ty)
    sums_I = tl.full([form.block, 16], 0.0, tl.float32)
    for j0 in range(begin, end, form.block):
        keys = key_block(j0, work, form)
        k_JH, v_JH = load_both(given.key, given.value, keys, work.head, form)
        _seen_IJ, ds_IJ = far_gradients(q_IH, k_JH, g_IH, v_JH, side, given, backward, queries, keys, work, form)
        ds_IJ = ds_IJ.to(k_JH.dtype)
        dq_IH = tl.dot(ds_IJ, k_JH, dq_IH, input_precision=form.precision)
        if form.has_content_to_position:
            sums_I = tl.dot(ds_IJ, ones_J, sums_I, input_precision=form.precision)
    if form.has_content_to_position:
        sum_I = tl.sum(sums_I, 1) * (1 / 16)
        pointers_I = numbers_of(backward.far_query_part, side, queries, work.sizes.num_queries, work.head)
        tl.store(pointers_I, sum_I * work.sizes.scale, mask=queries.is_there_I)
        row_H = load_saturated_row(given.key_table, side, work.head, work.sizes, form)
        dq_IH += sum_I[:, None] * (row_H * RESTORED)[None, :]
    return dq_IH
