"""The strided kernel computes what the reference does: context and every gradient, whatever is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deberta_xl.kernels import reference, strided
from deberta_xl.kernels.contract import Attend, Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.relative_index import Buckets

NO_DROPOUT = DropoutRule()


def random_inputs(where: Where, num_heads: int, head_size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and both kinds of relative rows, as layers have them: a token's heads side by side."""
    generator = torch.Generator().manual_seed(1)
    rows, length = where.segments_BT.shape
    queries = length if where.position_BM is None else where.position_BM.shape[1]
    shapes = [(rows, queries), (rows, length), (rows, length), (2 * where.buckets.span,), (2 * where.buckets.span,)]
    drawn = [torch.randn(*shape, num_heads * head_size, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def outcome(
    attend: Attend, inputs: list[Tensor], where: Where, heads: int, rule: DropoutRule, terms: str
) -> list[Tensor]:
    """The context, and the gradient of every input that takes part."""
    query, key, value, *rows = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in inputs)
    relative = RelativeRows(rows[0] if "c2p" in terms else None, rows[1] if "p2c" in terms else None)
    context = attend(query, Memory(key, value), relative, where, rule)
    taking_part = [x for x, name in zip(inputs, ["", "", "", "c2p", "p2c"], strict=True) if name in terms]
    sent = torch.randn(context.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [context.detach(), *torch.autograd.grad(context, taking_part, sent.to(context.dtype))]


def assert_same(where: Where, *, heads: int = 2, size: int = 4, rule: DropoutRule = NO_DROPOUT, terms: str = "c2p p2c"):
    """In float64, where the two differ by the order of sums alone. Pads attend nothing, and are attended by nothing."""
    inputs = random_inputs(where, heads, size)
    expected = outcome(reference.attention, inputs, where, heads, rule, terms)
    for found, wanted in zip(outcome(strided.attention, inputs, where, heads, rule, terms), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@st.composite
def segment_rows(draw) -> Tensor:
    """Two rows of documents of any length, with padding anywhere."""
    rows = [
        [number for number, length in draw(runs) for _ in range(length)]
        for runs in [st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=4)] * 2
    ]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


@settings(max_examples=30, deadline=None)
@given(
    segment_rows(),
    st.sampled_from([Buckets(8, 32), Buckets(0, 12), Buckets(6, 20, "transformers"), Buckets(32, 200)]),
    st.sampled_from(["c2p p2c", "c2p", "p2c", ""]),
    st.sampled_from([NO_DROPOUT, DropoutRule(0.3, 2**62 + 17, 5)]),
    st.sampled_from(["bidirectional", "causal", "prefix"]),
    st.tuples(st.integers(1, 3), st.integers(1, 5)),
    st.integers(0, 6),
)
def test_any_documents_have_the_contexts_and_gradients_of_the_reference(
    segments, buckets, terms, rule, mask, sizes, chosen
):
    where = Where(segments, buckets)
    if mask != "bidirectional":
        is_open = torch.arange(segments.shape[1]) % 5 == 1 if mask == "prefix" else torch.zeros(segments.shape[1])
        where = replace(where, open_BT=is_open.bool().expand_as(segments))
    if chosen:  # of pads, too, and some of them twice
        generator = torch.Generator().manual_seed(3)
        where = where.of_queries(torch.randint(segments.shape[1], (2, 2 * chosen), generator=generator))
    assert_same(where, heads=sizes[0], size=sizes[1], rule=rule, terms=terms)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, 200])
def test_a_length_need_not_be_a_multiple_of_the_tile(length):
    where = Where(torch.ones(1, length).long(), Buckets(16, 64))
    assert_same(where, rule=DropoutRule(0.2, 99))
    assert_same(where.of_queries(torch.tensor([[0, length // 2, length - 1, 0]])), rule=DropoutRule(0.2, 99))


@pytest.mark.parametrize("rule", [NO_DROPOUT, DropoutRule(0.3, 11)], ids=["", "dropout"])
def test_a_mask_of_pairs_is_obeyed_and_a_query_that_sees_nothing_gets_zeros(rule):
    mask = torch.rand(2, 70, 70, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1, 5] = False
    where = Where(torch.ones(2, 70).long(), Buckets(8, 32), mask)
    assert_same(where, rule=rule)
    assert_same(where.of_queries(torch.tensor([[0, 69, 3], [5, 5, 66]])), rule=rule)


@pytest.mark.parametrize("rule", [NO_DROPOUT, DropoutRule(0.3, 11)], ids=["", "dropout"])
def test_chosen_queries_get_what_they_get_among_all(rule):
    where = Where(torch.tensor([[1] * 30 + [2] * 37 + [0] * 3, [1] * 70]), Buckets(8, 32))
    position = torch.tensor([[0, 31, 29, 66], [69, 3, 4, 50]])
    inputs = random_inputs(where, 2, 4)
    chosen = [inputs[0][torch.arange(2)[:, None], position].detach().requires_grad_(), *inputs[1:]]
    terms = "c2p p2c"
    some = outcome(strided.attention, chosen, where.of_queries(position), 2, rule, terms)[0]
    whole = outcome(strided.attention, inputs, where, 2, rule, terms)[0]
    torch.testing.assert_close(
        some, whole[torch.arange(2)[:, None], :, position].transpose(1, 2), rtol=1e-10, atol=1e-10
    )


def test_documents_packed_padded_or_alone_have_the_same_contexts():
    lengths = (40, 3, 66)
    packed = Where(torch.tensor([[1] * 40 + [2] * 3 + [3] * 66]), Buckets(16, 64))
    inputs = random_inputs(packed, 2, 4)
    together = outcome(strided.attention, inputs, packed, 2, DropoutRule(0.3, 7), "c2p p2c")[0][0]
    padded = Where(torch.tensor([[1] * n + [0] * (66 - n) for n in lengths]), Buckets(16, 64))
    rows = [torch.nn.utils.rnn.pad_sequence(list(x[0].split(lengths)), batch_first=True) for x in inputs[:3]]
    rows = [x.detach().requires_grad_() for x in rows]
    apart = outcome(strided.attention, [*rows, *inputs[3:]], padded, 2, DropoutRule(0.3, 7), "c2p p2c")[0]
    for row, (number, length) in zip(together.split(lengths, dim=1), enumerate(lengths), strict=True):
        torch.testing.assert_close(apart[number, :, :length], row, rtol=1e-12, atol=1e-12)
        assert not apart[number, :, length:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scores_are_computed_in_float32(dtype):
    where = Where(torch.tensor([[1] * 50 + [2] * 20]), Buckets(8, 32))
    inputs = random_inputs(where, 2, 16, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    terms = "c2p p2c"
    wanted = outcome(reference.attention, exact, where, 2, NO_DROPOUT, terms)
    found = outcome(strided.attention, inputs, where, 2, NO_DROPOUT, terms)
    dense = outcome(reference.attention, inputs, where, 2, NO_DROPOUT, terms)
    for mine, theirs, true in zip(found, dense, wanted, strict=True):
        assert mine.dtype == dtype
        # One rounding of the output, where the reference rounds the probabilities as well.
        assert (mine - true).abs().max() <= 1.2 * (theirs - true).abs().max() + 1e-6


def test_nothing_is_kept_where_no_gradient_is_wanted():
    where = Where(torch.ones(1, 70).long(), Buckets(8, 32))
    inputs = random_inputs(where, 2, 4)
    query, key, value, *rows = (x.unflatten(-1, (2, -1)).transpose(-3, -2) for x in inputs)
    with torch.no_grad():
        quiet = strided.attention(query, Memory(key, value), RelativeRows(*rows), where, NO_DROPOUT)
    assert not quiet.requires_grad
    assert torch.equal(quiet, strided.attention(query, Memory(key, value), RelativeRows(*rows), where, NO_DROPOUT))


def test_without_a_key_a_recomputation_draws_the_same():
    where = Where(torch.ones(1, 20).long(), Buckets(8, 32))
    inputs = random_inputs(where, 2, 4)

    def attend(*given: Tensor) -> Tensor:
        query, key, value, *rows = (x.unflatten(-1, (2, -1)).transpose(-3, -2) for x in given)
        return strided.attention(query, Memory(key, value), RelativeRows(*rows), where, DropoutRule(0.5))

    found = []
    for recomputes in (False, True):
        torch.manual_seed(3)
        context = (
            torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False) if recomputes else attend(*inputs)
        )
        found.append([context, *torch.autograd.grad(context.square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_documents_of_one_length_keep_grows_with_their_number_alone():
    def kept_bytes(num_documents: int) -> int:
        where = Where(torch.arange(1, num_documents + 1).repeat_interleave(50).unsqueeze(0), Buckets(8, 32))
        inputs = random_inputs(where, 2, 4, torch.float32)
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            context = attended(inputs, where)
        assert context.requires_grad
        return sum(kept.values())

    once, twice, four_times = (kept_bytes(number) for number in (4, 8, 16))
    assert twice - once >= 4 * 2 * 50 * 50 * 4  # the probabilities of four more
    assert four_times - twice == 2 * (twice - once)


def attended(inputs: list[Tensor], where: Where) -> Tensor:
    """The context of two heads, with its graph."""
    query, key, value, *rows = (x.unflatten(-1, (2, -1)).transpose(-3, -2) for x in inputs)
    return strided.attention(query, Memory(key, value), RelativeRows(*rows), where, DropoutRule(0.1, 3))
