"""What the fused kernels share: a square tile of queries and keys, its scores by eq. (4), and which tiles there are.

Query i and key j of a document have the score (q_i·k_j + q_i·PK[i − j] + k_j·PQ[i − j]) · scale, PK and PQ being the
relative tables with one row for each offset (`tables.py`). Of a *near* tile the offsets are told apart: products with
two chunks of a table give its term as bands, which a shear puts in place (`shear.py`). Of a *far* tile every offset is
saturated, so both terms are a number for each query and one for each key: plain attention's cost.

Shape suffixes of this file:
    I queries of a tile   J keys of a tile   K offsets of a chunk   H head size, padded to a power of two
"""

import triton
import triton.language as tl

from deberta_xl.kernels.fused.blocks import RESTORED, Backward, Block, Given, Work, are_tokens, numbers_of
from deberta_xl.kernels.fused.draws import is_kept
from deberta_xl.kernels.fused.shear import in_blocks, shear_keys, slide


@triton.jit
def load_chunk(table: tl.tensor, offset: tl.tensor, work: Work, form: tl.constexpr) -> tl.tensor:
    """The rows of the offsets from `offset` on, [K, H], from a table with one row for each offset."""
    row_K = work.head * work.sizes.table_rows + work.sizes.center + offset + tl.arange(0, form.block)
    return tl.load(table + row_K[:, None] * form.width + tl.arange(0, form.width)[None, :])


@triton.jit
def query_band(q_IH: tl.tensor, given: Given, offset: tl.tensor, work: Work, form: tl.constexpr) -> tl.tensor:
    """Products of queries with the rows of the chunk that begins with `offset`, in blocks of [I, K]; zeros where the
    term is not used."""
    if form.has_content_to_position:
        rows_HK = tl.trans(load_chunk(given.key_table, offset, work, form))
        return in_blocks(tl.dot(q_IH, rows_HK, input_precision=form.precision).to(form.band), form.block)
    else:
        return tl.full([form.block // 8, form.block // 8, 8, 8], 0.0, form.band)


@triton.jit
def key_band(k_JH: tl.tensor, given: Given, offset: tl.tensor, work: Work, form: tl.constexpr) -> tl.tensor:
    """Products of those rows with keys, in blocks of [K, J]; the same."""
    if form.has_position_to_content:
        rows_KH = load_chunk(given.query_table, offset, work, form)
        return in_blocks(tl.dot(rows_KH, tl.trans(k_JH), input_precision=form.precision).to(form.band), form.block)
    else:
        return tl.full([form.block // 8, form.block // 8, 8, 8], 0.0, form.band)


@triton.jit
def query_bands(
    q_IH: tl.tensor, given: Given, offset: tl.tensor, work: Work, form: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of the chunk before `offset`, and of that from it on."""
    return query_band(q_IH, given, offset - form.block, work, form), query_band(q_IH, given, offset, work, form)


@triton.jit
def key_bands(
    k_JH: tl.tensor, given: Given, offset: tl.tensor, work: Work, form: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The same of keys."""
    return key_band(k_JH, given, offset - form.block, work, form), key_band(k_JH, given, offset, work, form)


@triton.jit
def near_scores(
    q_IH: tl.tensor, k_JH: tl.tensor, lower_IK: tl.tensor, higher_IK: tl.tensor, lower_KJ: tl.tensor,
    higher_KJ: tl.tensor, form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Eq. (4) before its scale, for a tile whose offsets are told apart, from the bands of its two chunks."""
    if form.has_content_to_position:
        position_IJ = slide(lower_IK, higher_IK, form.block, True).to(tl.float32)
    if form.has_position_to_content:
        to_content_IJ = shear_keys(lower_KJ, higher_KJ, form.block).to(tl.float32)
        if form.has_content_to_position:
            position_IJ += to_content_IJ
        else:
            position_IJ = to_content_IJ
    if form.has_content_to_position or form.has_position_to_content:
        return tl.dot(q_IH, tl.trans(k_JH), position_IJ * RESTORED, input_precision=form.precision)
    else:
        return tl.dot(q_IH, tl.trans(k_JH), input_precision=form.precision)


@triton.jit
def far_scores(
    q_IH: tl.tensor, k_JH: tl.tensor, side: tl.constexpr, given: Given, queries: Block, keys: Block, work: Work,
    form: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The same for a tile whose offsets are saturated: those of keys after the queries (0), or before them (1)."""
    scores_IJ = tl.dot(q_IH, tl.trans(k_JH), input_precision=form.precision)
    if form.has_content_to_position:
        pointers_I = numbers_of(given.query_part, side, queries, work.sizes.num_queries, work.head)
        scores_IJ += tl.load(pointers_I, mask=queries.is_there_I, other=0.0)[:, None]
    if form.has_position_to_content:
        pointers_J = numbers_of(given.key_part, side, keys, work.sizes.num_keys, work.head)
        scores_IJ += tl.load(pointers_J, mask=keys.is_there_I, other=0.0)[None, :]
    return scores_IJ


@triton.jit
def hide(scores_IJ: tl.tensor, queries: Block, keys: Block, work: Work, form: tl.constexpr) -> tl.tensor:
    """−inf at the keys that a query does not see."""
    i, j = queries.position_I, keys.position_I
    is_seen_IJ = keys.is_there_I[None, :]
    if form.has_order:
        is_seen_IJ = is_seen_IJ & ((j[None, :] <= i[:, None]) | (j < work.document.prefix)[None, :])
    scores_IJ = tl.where(is_seen_IJ, scores_IJ, -float("inf"))
    if work.document.has_holes:
        scores_IJ = tl.where(are_tokens(keys, work, form)[None, :], scores_IJ, -float("inf"))
    return scores_IJ


@triton.jit
def score_gradients(
    scores_IJ: tl.tensor, g_IH: tl.tensor, v_JH: tl.tensor, backward: Backward, queries: Block, keys: Block, work: Work,
    form: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(probabilities as the values saw them, gradients of the scaled scores)."""
    num_queries = work.sizes.num_queries
    log_sums_I = numbers_of(backward.log_sum, 0, queries, num_queries, work.head)
    log_sum_I = tl.load(log_sums_I, mask=queries.is_there_I, other=float("inf"))
    inner_I = tl.load(
        numbers_of(backward.inner, 0, queries, num_queries, work.head), mask=queries.is_there_I, other=0.0
    )
    scores_IJ = hide(scores_IJ, queries, keys, work, form)
    probabilities_IJ = tl.math.exp2(scores_IJ * work.sizes.scale_log2 - log_sum_I[:, None])
    if form.has_dropout:
        # A sign says what is dropped, so that nothing else of the mask lies in registers during the next product.
        is_kept_IJ = is_kept(work.draw, work.document.number, work.head, queries.position_I, keys.first, form.block)
        signed_IJ = tl.where(is_kept_IJ, probabilities_IJ, -probabilities_IJ)
        gradients_IJ = tl.dot(g_IH, tl.trans(v_JH), input_precision=form.precision)
        seen_IJ = tl.maximum(signed_IJ, 0.0) * work.draw.scale
        return seen_IJ, seen_IJ * gradients_IJ - tl.abs(signed_IJ) * inner_I[:, None]
    else:
        gradients_IJ = tl.dot(g_IH, tl.trans(v_JH), input_precision=form.precision)
        return probabilities_IJ, probabilities_IJ * (gradients_IJ - inner_I[:, None])


@triton.jit
def far_gradients(
    q_IH: tl.tensor,
    k_JH: tl.tensor,
    g_IH: tl.tensor,
    v_JH: tl.tensor,
    side: tl.constexpr,
    given: Given,
    backward: Backward,
    queries: Block,
    keys: Block,
    work: Work,
    form: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The same for a tile whose offsets are saturated."""
    scores_IJ = far_scores(q_IH, k_JH, side, given, queries, keys, work, form)
    return score_gradients(scores_IJ, g_IH, v_JH, backward, queries, keys, work, form)


@triton.jit
def keys_of(i0: tl.tensor, work: Work, form: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(left, right, end) for a block of queries: its tiles begin at 0 … end, the near ones at left … right."""
    end = work.document.length
    if form.has_order:
        end = tl.minimum(end, tl.maximum(i0 + form.block, work.document.prefix))
    end = tl.cdiv(end, form.block) * form.block
    right = tl.minimum(tl.cdiv(i0 + form.block - 1 + work.sizes.saturation, form.block) * form.block, end)
    return first_near_key(i0, work, form), right, end


@triton.jit
def first_near_key(i0: tl.tensor, work: Work, form: tl.constexpr) -> tl.tensor:
    """Where the near tiles of a block of queries begin."""
    return tl.maximum(i0 - work.sizes.saturation + 1, 0) // form.block * form.block


@triton.jit
def queries_of(j0: tl.tensor, work: Work, form: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(begin, top, bottom, end) for a block of keys: its tiles begin at begin … end, the near ones at top … bottom."""
    begin = 0
    if form.has_order:
        begin = tl.where(j0 < work.document.prefix, 0, j0)
    end = tl.cdiv(work.document.length, form.block) * form.block
    top = tl.maximum(tl.maximum(j0 - work.sizes.saturation + 1, 0) // form.block * form.block, begin)
    bottom = tl.minimum(tl.cdiv(j0 + form.block - 1 + work.sizes.saturation, form.block) * form.block, end)
    return begin, top, bottom, end


@triton.jit
def tile_place(queries: Block, keys: Block, work: Work, form: tl.constexpr) -> tl.tensor:
    """Where a near tile's gradients of scores begin, of [N, near, positions, J].

    A tile is in one piece, and there are as many rows as positions, however many documents they are.
    """
    slot = (keys.first - first_near_key(queries.first, work, form)) // form.block
    row = (work.head * work.sizes.near + slot).to(tl.int64) * work.sizes.num_keys + work.document.start
    return (row + queries.first) * form.block


@triton.jit
def store_tile(tiles: tl.tensor, ds_IJ: tl.tensor, queries: Block, keys: Block, work: Work, form: tl.constexpr) -> None:
    """Leave a near tile's gradients of scores."""
    i, j = tl.arange(0, form.block)[:, None], tl.arange(0, form.block)[None, :]
    pointers = tiles + tile_place(queries, keys, work, form) + i * form.block + j
    tl.store(pointers, ds_IJ.to(tiles.dtype.element_ty), mask=i < work.document.length - queries.first)


@triton.jit
def load_tile(
    tiles: tl.tensor, queries: Block, keys: Block, is_near: tl.tensor, work: Work, form: tl.constexpr
) -> tl.tensor:
    """A near tile's gradients of scores, in blocks of [I, J]; zeros where `is_near` says that it is none."""
    blocks: tl.constexpr = form.block // 8
    # Row of a block, block of keys, block of queries, column of a block: lanes follow this order, so that they read
    # whole sectors of memory, and store what shears gather from without bank conflicts.
    i = tl.arange(0, 8)[:, None, None, None] + tl.arange(0, blocks)[None, None, :, None] * 8
    j = tl.arange(0, blocks)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    pointers = tiles + tile_place(queries, keys, work, form) + i * form.block + j
    num_rows = (work.document.length - queries.first) * is_near
    return tl.permute(tl.load(pointers, mask=i < num_rows, other=0.0), (2, 1, 0, 3))


@triton.jit
def no_tile(tiles: tl.tensor, form: tl.constexpr) -> tl.tensor:
    """One of zeros."""
    return tl.full([form.block // 8, form.block // 8, 8, 8], 0.0, tiles.dtype.element_ty)


@triton.jit
def out_of_blocks(tile: tl.tensor, form: tl.constexpr) -> tl.tensor:
    """[I, J]."""
    return tl.reshape(tl.permute(tile, (0, 2, 1, 3)), [form.block, form.block])
