"""The forward pass: a program for a block of queries and a head. Far tiles come first, in a kernel of their own.

The softmax goes by running maxima, tile by tile: nothing is kept of it but two numbers for each query.

Shape suffixes of this file:
    I queries of a tile   J keys of a tile   K offsets of a chunk   H head size, padded to a power of two
"""

from typing import NamedTuple

import triton.language as tl
from triton import jit

from deberta_xl.kernels.fused.blocks import (
    Block,
    Given,
    Outcome,
    Sizes,
    Work,
    find_queries,
    key_block,
    load_both,
    load_rows,
    numbers_of,
    store_rows,
    those_of_tokens,
    zero_rows,
)
from deberta_xl.kernels.fused.draws import Draw, is_kept
from deberta_xl.kernels.fused.tiles import far_scores, hide, key_bands, keys_of, near_scores, query_band
from deberta_xl.kernels.fused.work_items import WorkItems


class Sums(NamedTuple):
    """Over the keys so far, inside a kernel: exponentials are relative to the maximum."""

    maximum_I: tl.tensor
    total_I: tl.tensor
    context_IH: tl.tensor


@jit
def forward_kernel(
    given: Given, outcome: Outcome, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """The context, and each query's log2 of the sum of exponentials."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        queries, work = find_queries(items, sizes, draw, item, form)
        i0 = queries.first
        q_IH = load_rows(given.query, queries, work.head, form)
        if form.has_far:
            sums = far_sums(outcome, queries, work, form)
        else:
            sums = no_keys(form)
        left, right, _end = keys_of(i0, work, form)
        lower_IK = query_band(q_IH, given, i0 - left, work, form)
        for j0 in range(left, right, form.block):
            keys = key_block(j0, work, form)
            k_JH, v_JH = load_both(given.key, given.value, keys, work.head, form)
            higher_IK = lower_IK  # of the tile before
            lower_IK = query_band(q_IH, given, i0 - j0 - form.block, work, form)
            lower_KJ, higher_KJ = key_bands(k_JH, given, i0 - j0, work, form)
            scores_IJ = near_scores(q_IH, k_JH, lower_IK, higher_IK, lower_KJ, higher_KJ, form)
            sums = add_keys(sums, scores_IJ, v_JH, queries, keys, work, form)
        found = those_of_tokens(queries, work, form)
        store_rows(outcome.context, found, work.head, sums.context_IH * (draw.scale / sums.total_I)[:, None], form)
        pointers_I = numbers_of(outcome.log_sum, 0, found, sizes.num_queries, work.head)
        tl.store(pointers_I, sums.maximum_I + tl.math.log2(sums.total_I), mask=found.is_there_I)


@jit
def far_forward_kernel(
    given: Given, outcome: Outcome, items: WorkItems, sizes: Sizes, draw: Draw, form: tl.constexpr
) -> None:
    """Context and sums over the keys of far tiles."""
    for item in range(tl.program_id(0), tl.load(items.count), tl.num_programs(0)):
        queries, work = find_queries(items, sizes, draw, item, form)
        q_IH = load_rows(given.query, queries, work.head, form)
        left, right, end = keys_of(queries.first, work, form)
        sums = add_far(no_keys(form), q_IH, 0, left, 1, given, queries, work, form)
        sums = add_far(sums, q_IH, right, end, 0, given, queries, work, form)
        store_rows(outcome.far_context, queries, work.head, sums.context_IH, form)
        pointers_I = numbers_of(outcome.far_sums, 0, queries, sizes.num_queries, work.head)
        tl.store(pointers_I, sums.maximum_I, mask=queries.is_there_I)
        pointers_I = numbers_of(outcome.far_sums, 1, queries, sizes.num_queries, work.head)
        tl.store(pointers_I, sums.total_I, mask=queries.is_there_I)


@jit
def far_sums(outcome: Outcome, queries: Block, work: Work, form: tl.constexpr) -> Sums:
    """Over the keys of far tiles."""
    num_queries, is_there_I = work.sizes.num_queries, queries.is_there_I
    maximum_I = tl.load(numbers_of(outcome.far_sums, 0, queries, num_queries, work.head), mask=is_there_I, other=0.0)
    total_I = tl.load(numbers_of(outcome.far_sums, 1, queries, num_queries, work.head), mask=is_there_I, other=0.0)
    return Sums(maximum_I, total_I, load_rows(outcome.far_context, queries, work.head, form))


@jit
def add_far(
    sums: Sums, q_IH: tl.tensor, begin: tl.tensor, end: tl.tensor, side: tl.constexpr, given: Given, queries: Block,
    work: Work, form: tl.constexpr,
) -> Sums:  # fmt: skip
    """With the keys at begin … end, of saturated offsets of one side."""
    for j0 in range(begin, end, form.block):
        keys = key_block(j0, work, form)
        k_JH, v_JH = load_both(given.key, given.value, keys, work.head, form)
        scores_IJ = far_scores(q_IH, k_JH, side, given, queries, keys, work, form)
        sums = add_keys(sums, scores_IJ, v_JH, queries, keys, work, form)
    return sums


@jit
def no_keys(form: tl.constexpr) -> Sums:
    """Over nothing."""
    lowest_I = tl.full([form.block], -1.0e30, tl.float32)
    return Sums(lowest_I, tl.full([form.block], 0.0, tl.float32), zero_rows(form))


@jit
def add_keys(
    sums: Sums, scores_IJ: tl.tensor, v_JH: tl.tensor, queries: Block, keys: Block, work: Work, form: tl.constexpr
) -> Sums:
    """With a tile's keys."""
    scores_IJ = hide(scores_IJ, queries, keys, work, form)
    scale = work.sizes.scale_log2
    higher_I = tl.maximum(sums.maximum_I, tl.max(scores_IJ, 1) * scale)
    weights_IJ = tl.math.exp2(scores_IJ * scale - higher_I[:, None])
    shrink_I = tl.math.exp2(sums.maximum_I - higher_I)
    total_I = sums.total_I * shrink_I + tl.sum(weights_IJ, 1)
    if form.has_dropout:
        is_kept_IJ = is_kept(work.draw, work.document.number, work.head, queries.position_I, keys.first, form.block)
        weights_IJ = tl.where(is_kept_IJ, weights_IJ, 0.0)
    weights_IJ = weights_IJ.to(v_JH.dtype)
    context_IH = tl.dot(weights_IJ, v_JH, sums.context_IH * shrink_I[:, None], input_precision=form.precision)
    return Sums(higher_I, total_I, context_IH)
