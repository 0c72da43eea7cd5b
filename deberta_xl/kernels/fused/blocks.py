"""What the fused kernels are given, and how their programs find, read and write blocks of a document's tokens.

Shape suffixes of this file:
    I tokens of a block   H head size, padded to a power of two
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from deberta_xl.kernels.fused.draws import Draw
from deberta_xl.kernels.fused.work_items import ENTRIES, WorkItems

TABLE_SCALE = 2.0**-4
"""Factor of the tables that kernels read. It is exact, and keeps the bands within float16's range."""
RESTORED: tl.constexpr = tl.constexpr(1 / TABLE_SCALE)
NUM_ENTRIES: tl.constexpr = tl.constexpr(ENTRIES)
BITS: tl.constexpr = tl.constexpr(7)
"""Entry of a work item that has the bits of its tokens."""


class Form(NamedTuple):
    """What a kernel is compiled for."""

    block: int
    """Queries and keys of a tile."""
    head_size: int
    width: int
    """The next power of two, at least 16: what a tile's rows have."""
    has_content_to_position: bool
    has_position_to_content: bool
    has_far: bool
    """Whether any tile may be far."""
    has_order: bool
    """Whether keys beyond a document's prefix are seen from themselves on only."""
    has_chosen: bool
    """Whether queries are chosen ones; where not, they have the places of the keys."""
    has_dropout: bool
    band: Any
    """Triton's type of the bands on their way through shared memory."""
    precision: str
    """Triton's `input_precision` of products."""


class Sizes(NamedTuple):
    """Numbers that a kernel is given."""

    num_keys: int
    """Positions of the batch."""
    num_queries: int
    """Rows of the queries' tensors."""
    table_rows: int
    center: int
    """Row of the tables that has offset 0."""
    saturation: int
    """Offsets i − j of so much or more share a row of the table, and so do those of its negative or less."""
    near: int
    """Most near tiles that a block of queries has."""
    scale: float
    scale_log2: float
    """scale · log2(e): exponentials are powers of two."""


class Given(NamedTuple):
    """What scores and context follow from. Anything where a kernel or the model has no use for it."""

    query: Tensor
    """[rows, N, H]."""
    key: Tensor
    """[positions, N, H]."""
    value: Tensor
    """The same."""
    key_table: Tensor
    """PK, [N, table rows, H], times TABLE_SCALE."""
    query_table: Tensor
    """PQ, the same."""
    query_part: Tensor
    """q_i·PK of far keys, float32 [2, N, rows]: 0 for keys after the query, 1 for keys before it."""
    key_part: Tensor
    """k_j·PQ of far keys, the same, [2, N, positions]."""


class Outcome(NamedTuple):
    """What the forward pass leaves. Of far tiles, which are computed first: anything where there are none."""

    context: Tensor
    """[rows, N, H]."""
    log_sum: Tensor
    """Each query's log2 of the sum of exponentials, float32 [N, rows]."""
    far_context: Tensor
    """The context of far keys, before its division by the sum, float32 [rows, N, H]."""
    far_sums: Tensor
    """The maximum and the sum of exponentials over far keys, float32 [2, N, rows]."""


class Backward(NamedTuple):
    """What the kernels of the backward pass are given besides, hand to one another, and leave."""

    gradient: Tensor
    """That of the context, [rows, N, H]."""
    log_sum: Tensor
    """Each query's log2 of the sum of exponentials, float32 [N, rows]; +inf where there is no query."""
    inner: Tensor
    """Each query's product of the context and its gradient, the same."""
    tiles: Tensor
    """Gradients of the near tiles' scores, [N, near, positions, J]."""
    far_query: Tensor
    """Share of dQ, before its scale, that far tiles give, float32 [rows, N, H]."""
    far_key: Tensor
    """Their share of dK, the same, [positions, N, H]."""
    far_value: Tensor
    """Their share of dV, the same."""
    far_key_part: Tensor
    """Gradient of `Given.key_part`."""
    far_query_part: Tensor
    """Gradient of `Given.query_part`."""
    query_gradient: Tensor
    key_gradient: Tensor
    value_gradient: Tensor


class Document(NamedTuple):
    """A document, inside a kernel."""

    start: Tensor
    """Its first position in the batch, int64."""
    length: Tensor
    prefix: Tensor
    """From where on keys are seen from themselves on only."""
    number: Tensor
    first_item: Tensor
    """Number of its first block among the work items."""
    has_holes: Tensor
    """Whether there is padding among its tokens."""


class Work(NamedTuple):
    """What a program has in hand, inside a kernel: a block of a document, for a head."""

    items: WorkItems
    sizes: Sizes
    draw: Draw
    document: Document
    head: Tensor


class Block(NamedTuple):
    """Queries or keys of a tile, inside a kernel."""

    first: Tensor
    """Position in the document of the first of them."""
    position_I: Tensor
    origin: Tensor
    """From where on rows of tensors are counted, int64."""
    row_I: Tensor
    is_there_I: Tensor
    """Whether a row may be read."""


@triton.jit
def find_work(items: WorkItems, sizes: Sizes, draw: Draw, item: tl.tensor) -> tuple[tl.tensor, Work]:
    """(position of the item's block in its document, all else of it)."""
    entry = items.table_LK + item * NUM_ENTRIES
    document = Document(
        tl.load(entry),
        tl.load(entry + 2).to(tl.int32),
        tl.load(entry + 3).to(tl.int32),
        tl.load(entry + 4).to(tl.int32),
        tl.load(entry + 5).to(tl.int32),
        tl.load(entry + 6) != 0,
    )
    return tl.load(entry + 1).to(tl.int32), Work(items, sizes, draw, document, tl.program_id(1))


@triton.jit
def key_block(j0: tl.tensor, work: Work, form: tl.constexpr) -> Block:
    """The keys from position `j0` on."""
    j = j0 + tl.arange(0, form.block)
    return Block(j0, j, work.document.start, j, j < work.document.length)


@triton.jit
def query_block(i0: tl.tensor, work: Work, form: tl.constexpr) -> Block:
    """The queries at the positions from `i0` on."""
    i = i0 + tl.arange(0, form.block)
    origin, row_I, is_there_I = work.document.start, i, i < work.document.length
    if form.has_chosen:
        row_I = tl.load(work.items.query_row_L + work.document.start + i, mask=is_there_I, other=-1)
        origin, is_there_I = work.document.start * 0, row_I >= 0
    return Block(i0, i, origin, row_I, is_there_I)


@triton.jit
def find_queries(items: WorkItems, sizes: Sizes, draw: Draw, item: tl.tensor, form: tl.constexpr) -> tuple[Block, Work]:
    """The queries of an item, and all else of it."""
    i0, work = find_work(items, sizes, draw, item)
    return query_block(i0, work, form), work


@triton.jit
def find_keys(items: WorkItems, sizes: Sizes, draw: Draw, item: tl.tensor, form: tl.constexpr) -> tuple[Block, Work]:
    """The keys of an item, and all else of it."""
    j0, work = find_work(items, sizes, draw, item)
    return key_block(j0, work, form), work


@triton.jit
def are_tokens(block: Block, work: Work, form: tl.constexpr) -> tl.tensor:
    """Whether there are tokens at the positions of a block."""
    # Volatile: what follows from it is not computed before a loop, to lie in registers throughout it.
    pointer = work.items.table_LK + (work.document.first_item + block.first // form.block) * NUM_ENTRIES + BITS
    bits = tl.load(pointer, volatile=True)
    return ((bits >> tl.arange(0, form.block).to(tl.int64)) & 1) != 0


@triton.jit
def rows_of(base: tl.tensor, block: Block, head: tl.tensor, form: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(where a head's rows of [rows, N, H] are, which of their numbers there are)."""
    h = tl.arange(0, form.width)
    stride = tl.num_programs(1) * form.head_size
    mask = block.is_there_I[:, None]
    if form.width != form.head_size:
        mask = mask & (h < form.head_size)[None, :]
    base += block.origin * stride + head * form.head_size
    return base + block.row_I[:, None] * stride + h[None, :], mask


@triton.jit
def load_rows(base: tl.tensor, block: Block, head: tl.tensor, form: tl.constexpr) -> tl.tensor:
    """[I, H] of [rows, N, H]; zeros where nothing is."""
    pointers, mask = rows_of(base, block, head, form)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def zero_rows(form: tl.constexpr) -> tl.tensor:
    """[I, H], to add to. (`tl.zeros` takes no sizes from a `Form` before Triton 3.7.)"""
    return tl.full([form.block, form.width], 0.0, tl.float32)


@triton.jit
def store_rows(base: tl.tensor, block: Block, head: tl.tensor, rows_IH: tl.tensor, form: tl.constexpr) -> None:
    """The other way round."""
    pointers, mask = rows_of(base, block, head, form)
    tl.store(pointers, rows_IH.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_both(
    one: tl.tensor, other: tl.tensor, block: Block, head: tl.tensor, form: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The same rows of two tensors."""
    return load_rows(one, block, head, form), load_rows(other, block, head, form)


@triton.jit
def numbers_of(base: tl.tensor, side: tl.constexpr, block: Block, num_rows: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Where a head's numbers of [sides, N, rows] are."""
    return base + (side * tl.num_programs(1) + head) * num_rows + block.origin + block.row_I


@triton.jit
def load_saturated_row(
    table: tl.tensor, side: tl.constexpr, head: tl.tensor, sizes: Sizes, form: tl.constexpr
) -> tl.tensor:
    """The row of far keys after the query (0) or before it (1), [H]."""
    row = head * sizes.table_rows + (sizes.table_rows - 1) * side
    return tl.load(table + row * form.width + tl.arange(0, form.width)).to(tl.float32)


@triton.jit
def begin_sum(far_share: tl.tensor, block: Block, work: Work, form: tl.constexpr) -> tl.tensor:
    """What near tiles are added to, [I, H]: what far ones have given, or zeros where none is far."""
    if form.has_far:
        return load_rows(far_share, block, work.head, form)
    else:
        return zero_rows(form)


@triton.jit
def those_of_tokens(queries: Block, work: Work, form: tl.constexpr) -> Block:
    """Without those at padding, of which nothing is written."""
    is_there_I = queries.is_there_I & are_tokens(queries, work, form)
    return Block(queries.first, queries.position_I, queries.origin, queries.row_I, is_there_I)
