"""The fused kernels under Triton's interpreter: `test_fused.py` runs these in a process that is told to interpret.

An operation takes a millisecond there, so everything is tiny: tiles of 16, and documents of up to four of them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from deberta_xl.kernels import reference
from deberta_xl.kernels.contract import Attend, Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule, drop, keep_pairs
from deberta_xl.kernels.fused import attention as fused
from deberta_xl.kernels.fused import blocks, draws, plan, shear, tiles
from deberta_xl.kernels.fused.drop import drop_states
from deberta_xl.kernels.fused.plan import Launch, Tuning
from deberta_xl.kernels.fused.work_items import WorkItems, work_items
from deberta_xl.kernels.relative_index import Buckets

EXAMPLES = int(os.environ["FUSED_EXAMPLES"])
TOLERANCE = 2e-6
"""Of the largest value: sums of some dozens of float32 products, against float64."""
NO_DROPOUT = DropoutRule()
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
"""Without explanations, which trace every line of the interpreter."""
DROPOUT = DropoutRule(0.3, 2**62 + 17, 3)


def call_interpreted(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
    """Triton's, but that what is patched already is not patched again at every call, which takes half of the time."""
    if self.fn.__module__.startswith("triton."):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


interpreter.InterpretedFunction.__call__ = call_interpreted


@pytest.fixture(autouse=True)
def tiles_of_16(monkeypatch):
    set_tiles(monkeypatch, 16)


def set_tiles(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Tiles of another size for all kernels."""
    for name in ("NARROW", "WIDE"):
        launches = dict.fromkeys(getattr(plan, name).launches, Launch(4))
        monkeypatch.setattr(plan, name, Tuning(block, launches))


def random_inputs(where: Where, num_heads: int, head_size: int) -> list[Tensor]:
    """Queries, keys, values [B, N, L, H] and both kinds of relative rows [N, R, H], float32."""
    generator = torch.Generator().manual_seed(1)
    rows, length = where.segments_BT.shape
    queries = length if where.position_BM is None else where.position_BM.shape[1]
    table = (num_heads, 2 * where.buckets.span, head_size)
    shapes = [(rows, num_heads, n, head_size) for n in (queries, length, length)] + [table, table]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def outcome(attend: Attend, inputs: list[Tensor], where: Where, rule: DropoutRule, terms: str) -> list[Tensor]:
    """The context, and the gradient of every input that takes part."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    query, key, value, key_rows, query_rows = inputs
    relative = RelativeRows(key_rows if "c2p" in terms else None, query_rows if "p2c" in terms else None)
    context = attend(query, Memory(key, value), relative, where, rule)
    taking_part = [x for x, name in zip(inputs, ["", "", "", "c2p", "p2c"], strict=True) if name in terms]
    sent = torch.randn(context.shape, generator=torch.Generator().manual_seed(2))
    return [context.detach(), *torch.autograd.grad(context, taking_part, sent.to(context.dtype))]


def assert_exact(
    where: Where, *, heads: int = 1, size: int = 16, rule: DropoutRule = NO_DROPOUT, terms: str = "c2p p2c"
) -> None:
    """Against the reference in float64."""
    inputs = random_inputs(where, heads, size)
    expected = outcome(reference.attention, [x.double() for x in inputs], where, rule, terms)
    for found, wanted in zip(outcome(fused.attention, inputs, where, rule, terms), expected, strict=True):
        # Scores of one key alone have the gradient 0.
        assert (found - wanted).abs().max() <= TOLERANCE * (float(wanted.abs().max()) or 1.0)


def row_of(lengths: list[int]) -> list[int]:
    """Documents one after the other."""
    return [number for number, length in enumerate(lengths, 1) for _ in range(length)]


LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49])
FORMS = st.tuples(
    st.sampled_from([Buckets(8, 16), Buckets(0, 6), Buckets(4, 9, "transformers"), Buckets(0, 40)]),
    st.sampled_from(["c2p p2c", "c2p p2c", "c2p", "p2c", ""]),
    st.sampled_from(["bidirectional", "causal", "prefix"]),
    st.sampled_from([NO_DROPOUT, DROPOUT]),
    st.sampled_from([16, 16, 32, 12]),
    st.booleans(),
)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=PHASES)
@given(st.lists(LENGTHS, min_size=1, max_size=2), st.integers(0, 5), FORMS)
def test_context_and_gradients_are_the_references(lengths, padding, form):
    buckets, terms, mask, rule, size, is_chosen = form
    row = row_of(lengths)
    where = Where(torch.tensor([[0] * padding + row, row + [0] * padding]), buckets)
    if mask != "bidirectional":
        first = torch.tensor([i for length in lengths for i in range(length)])
        is_open = (first < 20 if mask == "prefix" else first < 0).expand(2, -1)
        padded = torch.zeros(2, padding).bool()
        where = replace(
            where, open_BT=torch.stack([torch.cat([padded[0], is_open[0]]), torch.cat([is_open[1], padded[1]])])
        )
    if is_chosen:
        where = where.of_queries(torch.tensor([sorted({padding, len(row) // 2 + padding}), sorted({0, len(row) // 2})])
                                 if len(row) > 1 else torch.tensor([[padding], [0]]))  # fmt: skip
    assert_exact(where, size=size, rule=rule, terms=terms)


def test_tokens_see_each_other_across_padding_between_them():
    assert_exact(Where(torch.tensor([[1] * 9 + [0] * 12 + [1] * 13]), Buckets(8, 16)))


def test_a_program_has_several_documents_where_there_are_many_short_ones():
    assert_exact(Where(torch.tensor([row_of([1, 2] * 5)]), Buckets(8, 16)), heads=2, rule=DROPOUT)


def test_a_choice_is_filled_up_with_positions_that_are_not_computed_again():
    where = Where(torch.tensor([row_of([19])]), Buckets(8, 16)).of_queries(torch.tensor([[0, 7, 0]]))
    inputs = random_inputs(where, 1, 16)
    found = outcome(fused.attention, inputs, where, NO_DROPOUT, "c2p p2c")
    alone = replace(where, position_BM=torch.tensor([[0, 7]]))
    inputs[0] = inputs[0][:, :, :2]
    context = outcome(reference.attention, inputs, alone, NO_DROPOUT, "c2p p2c")[0]
    torch.testing.assert_close(found[0][:, :, :2], context, rtol=1e-5, atol=1e-6)
    assert not found[0][:, :, 2].any()
    assert not found[1][:, :, 2].any()


def test_documents_packed_or_padded_have_the_same_bits_and_pads_are_neither_read_nor_written():
    lengths, rule = (34, 5), DROPOUT
    packed = Where(torch.tensor([row_of(list(lengths)) + [0] * 3]), Buckets(8, 16))
    inputs = random_inputs(packed, 1, 16)
    for x in inputs[:3]:
        x[:, :, sum(lengths) :] = torch.nan
    padded = Where(torch.tensor([[1] * n + [0] * (40 - n) for n in lengths]), Buckets(8, 16))
    apart = [torch.full((2, 1, 40, 16), torch.nan) for _ in range(3)]
    for whole, rows in zip(inputs, apart, strict=False):
        for row, part in zip(rows, whole[0, :, : sum(lengths)].split(lengths, dim=1), strict=True):
            row[:, : part.shape[1]] = part
    together = run_documents(inputs, packed, rule)
    again = run_documents(inputs, packed, rule)
    separate = run_documents([*apart, *inputs[3:]], padded, rule)
    for one, other, another in zip(together, again, separate, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)


def run_documents(inputs: list[Tensor], where: Where, rule: DropoutRule) -> list[Tensor]:
    """Context and gradients of the tokens one after the other, and the gradients of the tables; zeros at padding."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    context = fused.attention(inputs[0], Memory(*inputs[1:3]), RelativeRows(*inputs[3:]), where, rule)
    is_token = where.segments_BT > 0
    count = int(is_token.sum())
    sent = torch.full_like(context, torch.nan).transpose(1, 2)
    sent[is_token] = torch.randn(count, *sent.shape[2:], generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(context, inputs, sent.transpose(1, 2))
    by_token = [x.transpose(1, 2) for x in (context.detach(), *gradients[:3])]
    for x in by_token:
        assert not x[~is_token].any()
    return [x[is_token] for x in by_token] + list(gradients[3:])


def test_the_size_of_tiles_changes_no_more_than_rounding(monkeypatch):
    where = Where(torch.tensor([row_of([33])]), Buckets(8, 16))
    inputs = random_inputs(where, 1, 16)
    small = outcome(fused.attention, inputs, where, DROPOUT, "c2p p2c")
    set_tiles(monkeypatch, 32)
    for found, wanted in zip(outcome(fused.attention, inputs, where, DROPOUT, "c2p p2c"), small, strict=True):
        assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@triton.jit
def shears_kernel(one, other, found, block: tl.constexpr) -> None:
    """All shears of two squares."""
    place = tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :]
    x, y = shear.in_blocks(tl.load(one + place), block), shear.in_blocks(tl.load(other + place), block)
    tl.store(found + place, shear.slide(x, y, block, True))
    tl.store(found + block * block + place, shear.slide(x, y, block, False))
    tl.store(found + 2 * block * block + place, shear.shear_keys(x, y, block))
    tl.store(found + 3 * block * block + place, shear.unshear_keys(x, y, block, True))
    tl.store(found + 4 * block * block + place, shear.as_operand(shear.unshear_keys(x, y, block, False), block))


@pytest.mark.parametrize("block", [16, 32])
def test_shears_are_index_gathers(block):
    i, c = torch.arange(block)[:, None], torch.arange(block)
    one, other, found = torch.randn(block, block), torch.randn(block, block), torch.empty(5, block, block)
    shears_kernel[(1,)](one, other, found, block)
    wide, tall = torch.cat([one, other], 1), torch.cat([one, other])
    slid = wide.gather(1, block + i - c)
    unsheared = tall.gather(0, i.T + c[:, None]).T
    for result, wanted in zip(
        found, (slid, slid.T, tall.gather(0, block + i - c), unsheared, unsheared.T), strict=True
    ):
        assert torch.equal(result, wanted)


@triton.jit
def words_kernel(draw, document, head, kept, block: tl.constexpr) -> None:
    """The mask of one tile."""
    i, j = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1) * block + tl.arange(0, block)
    is_kept = draws.is_kept(draw, document, head, i, tl.program_id(1) * block, block)
    tl.store(kept + i[:, None] * tl.num_programs(1) * block + j[None, :], is_kept.to(tl.int8))


@pytest.mark.parametrize("rule", [DROPOUT, DropoutRule(0.1, 2**63 - 1), DropoutRule(0.5, 2**31)], ids=str)
def test_a_tile_draws_the_words_of_the_dropout_on_cpus(rule):
    where = Where(torch.tensor([[1] * 48, [2] * 48, [1] * 48]), Buckets(8, 16))
    expected_BNST = keep_pairs(where.places, 2, 48, rule)
    kept = torch.empty(48, 48, dtype=torch.int8)
    words_kernel[(3, 3)](draws.draw_of(rule), 2, 1, kept, 16)
    assert torch.equal(kept.bool(), expected_BNST[2, 1])


@pytest.mark.parametrize("width", [6, 7, 40])
@pytest.mark.parametrize("rule", [DROPOUT, DropoutRule(0.1, 2**63 - 1)], ids=str)
def test_states_are_dropped_as_on_cpus(width, rule):
    x = torch.randn(3, 4, width)
    for row in (None, torch.randint(2**40, (3, 4))):
        wanted = drop(x, rule, row)
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        found = drop_states(ours, rule, row)
        assert torch.equal(found, wanted)
        sent = torch.randn_like(x)
        assert torch.equal(*(torch.autograd.grad(y, z, sent)[0] for y, z in
                             ((found, ours), (drop(theirs, rule, row), theirs))))  # fmt: skip


@triton.jit
def borders_kernel(found, items, sizes, draw, form: tl.constexpr) -> None:
    """Where the near tiles of every block of one document begin and end: of its queries, and of its keys."""
    for item in range(0, tl.load(items.count)):
        i0, work = blocks.find_work(items, sizes, draw, item)
        left, right, end = tiles.keys_of(i0, work, form)
        begin, top, bottom, last = tiles.queries_of(i0, work, form)
        row = found + item * 7
        tl.store(row, left)
        tl.store(row + 1, right)
        tl.store(row + 2, end)
        tl.store(row + 3, begin)
        tl.store(row + 4, top)
        tl.store(row + 5, bottom)
        tl.store(row + 6, last)


@settings(max_examples=4 * EXAMPLES, deadline=None, derandomize=True, phases=PHASES)
@given(st.integers(1, 150), st.integers(0, 60), st.integers(0, 150), st.booleans())
def test_a_tile_is_near_where_an_offset_is_not_saturated(length, saturation, prefix, has_order):
    prefix = min(prefix, length)
    is_open = torch.arange(length)[None] < prefix
    items = work_items(torch.ones(1, length).long(), is_open if has_order else None, None, 16)
    form = blocks.Form(16, 16, 16, True, True, True, has_order, False, False, tl.float32, "ieee")
    sizes = blocks.Sizes(length, length, 1, 0, saturation, 1, 1.0, 1.0)
    found = torch.zeros(-(-length // 16), 7, dtype=torch.int32)
    borders_kernel[(1,)](found, items, sizes, draws.draw_of(NO_DROPOUT), form)
    starts = range(0, length, 16)
    for block, (left, right, end, begin, top, bottom, last) in zip(starts, found.tolist(), strict=True):
        tiles = {j0 for j0 in starts if is_visited(block, j0, prefix, has_order)}
        near = {j0 for j0 in tiles if is_near(block, j0, saturation)}
        assert set(range(0, end, 16)) == tiles
        assert set(range(left, right, 16)) == near
        tiles = {i0 for i0 in starts if is_visited(i0, block, prefix, has_order)}
        assert set(range(begin, last, 16)) == tiles
        assert set(range(top, bottom, 16)) == {i0 for i0 in tiles if is_near(i0, block, saturation)}


def is_visited(i0: int, j0: int, prefix: int, has_order: bool) -> bool:
    """Whether any query of the tile may see any key of it."""
    return not has_order or j0 <= i0 or j0 < prefix


def is_near(i0: int, j0: int, saturation: int) -> bool:
    """By the definition; the main diagonal is always near."""
    return i0 == j0 or any(abs(i0 - j0 + d) < saturation for d in range(-15, 16))


def test_work_items_are_the_blocks_of_all_documents():
    items: WorkItems = work_items(
        torch.tensor([[0, 1, 1, 1, 2], [3, 3, 0, 3, 0]]), None, torch.tensor([[1, 4, 1]] * 2), 2
    )
    assert items.count.tolist() == [5]
    expected = [
        [1, 0, 3, 3, 0, 0, 0, 0b11], [1, 2, 3, 3, 0, 0, 0, 0b01], [4, 0, 1, 1, 1, 2, 0, 0b01],
        [5, 0, 4, 4, 2, 3, 1, 0b11], [5, 2, 4, 4, 2, 3, 1, 0b10],
    ]  # fmt: skip
    assert items.table_LK[:5].tolist() == expected
    assert items.query_row_L.tolist() == [-1, 0, -1, -1, 1, -1, 3, -1, -1, -1]
