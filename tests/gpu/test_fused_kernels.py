"""The fused kernels on a GPU: exact, the same bits again and however documents lie, and linear in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.kernels import reference
from deberta_xl.kernels.add_norm import add_norm
from deberta_xl.kernels.contract import Attend, Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule, drop
from deberta_xl.kernels.fused import attention as fused
from deberta_xl.kernels.relative_index import Buckets

TOLERANCE = 2e-6
"""Of the largest value, in float32 against float64."""
NO_DROPOUT, DROPOUT = DropoutRule(), DropoutRule(0.1, 2**62 + 17, 3)
TERMS = "c2p p2c"
HEADS = 3
V2, V1, SHORT = Buckets(256, 512), Buckets(0, 512), Buckets(32, 128)
DENSE = [[512], [512]]
PACKED = [[300, 150, 50, 12], [200, -112, 1, 199]]
"""Lengths of documents in each row; a negative one is padding."""
LONG = [[1100, 436]]
CASES = {
    "dense": (DENSE, V2, 64, {}),
    "packed": (PACKED, V2, 64, {}),
    "far": (LONG, SHORT, 64, {}),
    "causal": (LONG, SHORT, 64, {"mask": "causal"}),
    "prefix": (PACKED, V2, 64, {"mask": "prefix"}),
    "chosen": (PACKED, V2, 64, {"is_chosen": True}),
    "c2p": (PACKED, V2, 64, {"terms": "c2p"}),
    "p2c": (LONG, SHORT, 64, {"terms": "p2c"}),
    "content": (PACKED, V2, 64, {"terms": ""}),
    "unbucketed": (PACKED, V1, 64, {}),
    "transformers": (LONG, SHORT._replace(rule="transformers"), 64, {}),
    "heads_of_32": (PACKED, V2, 32, {}),
    "heads_of_80": (PACKED, V2, 80, {}),
    "heads_of_128": (LONG, SHORT, 128, {}),
}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def segments_of(lengths: list[list[int]]) -> Tensor:
    """[B, T] on the GPU."""
    rows = []
    for row in lengths:
        numbers = torch.tensor([0 if length < 0 else number for number, length in enumerate(row, 1)])
        rows.append(torch.repeat_interleave(numbers, torch.tensor(row).abs()))
    return torch.stack(rows).cuda()


def where_of(lengths: list[list[int]], buckets: Buckets, mask: str = "", is_chosen: bool = False) -> Where:
    """With an open prefix of 70 positions of each row, or with every third position chosen as a query."""
    where = Where(segments_of(lengths), buckets)
    key_T = torch.arange(where.segments_BT.shape[1], device="cuda")
    if mask:
        where = replace(where, open_BT=(key_T < (70 if mask == "prefix" else 0)).expand_as(where.segments_BT))
    if is_chosen:
        where = where.of_queries(key_T[1::3].expand(len(where.segments_BT), -1))
    return where


def random_inputs(where: Where, head_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values [B, N, L, H] and both kinds of relative rows [N, R, H]."""
    generator = torch.Generator("cuda").manual_seed(1)
    rows, length = where.segments_BT.shape
    queries = length if where.position_BM is None else where.position_BM.shape[1]
    table = (HEADS, 2 * where.buckets.span, head_size)
    shapes = [(rows, HEADS, n, head_size) for n in (queries, length, length)] + [table, table]
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def outcome(attend: Attend, inputs: list[Tensor], where: Where, rule: DropoutRule, terms: str) -> list[Tensor]:
    """The context, and the gradient of every input that takes part; of no pads."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    query, key, value, key_rows, query_rows = inputs
    relative = RelativeRows(key_rows if "c2p" in terms else None, query_rows if "p2c" in terms else None)
    context = attend(query, Memory(key, value), relative, where, rule)
    taking_part = [x for x, name in zip(inputs, ["", "", "", "c2p", "p2c"], strict=True) if name in terms]
    sent = torch.randn(context.shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda")
    gradients = torch.autograd.grad(context, taking_part, sent.to(context.dtype))
    segments_BS = where.segments_BT
    if where.position_BM is not None:
        segments_BS = segments_BS.gather(1, where.position_BM)
    return [context.detach() * (segments_BS > 0)[:, None, :, None], *gradients]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Largest, of the largest value."""
    return [float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)]


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Of the norm."""
    return [float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("rule", [NO_DROPOUT, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_context_and_gradients_are_the_references(case, dtype, rule):
    lengths, buckets, head_size, options = CASES[case]
    terms = options.get("terms", TERMS)
    where = where_of(lengths, buckets, options.get("mask", ""), options.get("is_chosen", False))
    inputs = random_inputs(where, head_size, dtype)
    expected = outcome(reference.attention, [x.double() for x in inputs], where, rule, terms)
    found = outcome(fused.attention, inputs, where, rule, terms)
    if dtype == torch.float32:
        off = errors(found, expected)
        allowed = [TOLERANCE] * len(off)
    else:  # whole tensors: which single element is rounded worst is chance
        off = distances(found, expected)
        own = distances(outcome(reference.attention, inputs, where, rule, terms), expected)
        allowed = [2 * x for x in own]
        print("the reference's own:", " ".join(f"{x:.1e}" for x in own))
    print(case, dtype, f"{rule.rate:g}", " ".join(f"{x:.1e}" for x in off))
    assert all(x <= most for x, most in zip(off, allowed, strict=True))
    for one, again in zip(found, outcome(fused.attention, inputs, where, rule, terms), strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_packed_or_padded_have_the_same_bits(dtype):
    lengths = [300, 150, 50, 12]
    packed, padded = where_of([lengths], V2), where_of([[n, n - 512] for n in lengths], V2)
    inputs = random_inputs(packed, 64, dtype)
    apart = [torch.full((len(lengths), HEADS, 512, 64), torch.nan, dtype=dtype, device="cuda") for _ in range(3)]
    for whole, rows in zip(inputs, apart, strict=False):
        for row, part in zip(rows, whole[0].split(lengths, dim=1), strict=True):
            row[:, : part.shape[1]] = part
    together = by_token(inputs, packed)
    separate = by_token([*apart, *inputs[3:]], padded)
    for one, other in zip(together, separate, strict=True):
        assert torch.equal(one, other)


def by_token(inputs: list[Tensor], where: Where) -> list[Tensor]:
    """Context and gradients of the tokens one after the other, and the gradients of the tables; zeros at padding."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    context = fused.attention(inputs[0], Memory(*inputs[1:3]), RelativeRows(*inputs[3:]), where, DROPOUT)
    is_token = where.segments_BT > 0
    sent = torch.full_like(context, torch.nan).transpose(1, 2)
    drawn = torch.randn(int(is_token.sum()), *sent.shape[2:], generator=torch.Generator().manual_seed(2))
    sent[is_token] = drawn.to(sent)
    gradients = torch.autograd.grad(context, inputs, sent.transpose(1, 2))
    tokens = [x.transpose(1, 2) for x in (context.detach(), *gradients[:3])]
    for x in tokens:
        assert not x[~is_token].any()
    return [x[is_token] for x in tokens] + list(gradients[3:])


def test_the_masks_of_dropout_are_those_of_a_cpu():
    where = where_of(PACKED, V2)
    inputs = random_inputs(where, 64, torch.float32)
    at_home = replace(where, segments_BT=where.segments_BT.cpu())
    query, key, value, *rows = (x.cpu() for x in inputs)
    wanted = reference.attention(query, Memory(key, value), RelativeRows(*rows), at_home, DROPOUT)
    found = fused.attention(inputs[0], Memory(*inputs[1:3]), RelativeRows(*inputs[3:]), where, DROPOUT)
    assert errors([found.cpu()], [wanted])[0] <= 2 * TOLERANCE


def test_what_is_kept_and_what_it_takes_grow_as_the_length():
    def bytes_at(length: int) -> tuple[int, int]:
        """(kept for the backward pass, most at once) of rows of that length."""
        where = where_of([[length]], V2)
        inputs = [x.requires_grad_() for x in random_inputs(where, 64, torch.bfloat16)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        context = fused.attention(inputs[0], Memory(*inputs[1:3]), RelativeRows(*inputs[3:]), where, DROPOUT)
        kept = torch.cuda.memory_allocated() - before
        context.sum().backward()
        return kept, torch.cuda.max_memory_allocated() - before

    short, double, fourfold = (bytes_at(length) for length in (4096, 8192, 16384))
    print("kept, most at 4,096, 8,192, 16,384:", short, double, fourfold)
    for once, twice in ((short, double), (double, fourfold)):
        assert twice[0] <= 2.05 * once[0]
        assert twice[1] <= 2.05 * once[1]


def test_a_pass_does_not_wait_for_the_gpu():
    where = where_of(PACKED, V2)
    inputs = random_inputs(where, 64, torch.bfloat16)
    outcome(fused.attention, inputs, where, DROPOUT, TERMS)  # compiled, and what is kept on the host is there
    fresh = where_of(PACKED, V2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(fused.attention, inputs, fresh, DROPOUT, TERMS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 7])
def test_states_are_dropped_as_on_a_cpu(width, dtype):
    x = torch.randn(3, 50, width, dtype=dtype)
    row = torch.randint(2**40, (3, 50))
    for numbers in (None, row):
        ours, theirs = x.cuda().requires_grad_(), x.clone().requires_grad_()
        found, wanted = drop(ours, DROPOUT, None if numbers is None else numbers.cuda()), drop(theirs, DROPOUT, numbers)
        assert torch.equal(found.cpu(), wanted)
        sent = torch.randn_like(x)
        gradients = (torch.autograd.grad(y, z, sent.to(y.device))[0] for y, z in ((found, ours), (wanted, theirs)))
        assert torch.equal(*(gradient.cpu() for gradient in gradients))


@pytest.mark.parametrize("rule", [NO_DROPOUT, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 7])
def test_a_normalised_sum_and_its_gradients_are_those_of_torchs_operators(width, dtype, rule):
    def by_operators(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *_: object) -> Tensor:
        return F.layer_norm(residual + drop(x, rule), (width,), weight, bias, 1e-7)

    shapes = [(3, 50, width)] * 2 + [(width,)] * 2
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    sent = torch.randn(shapes[0], device="cuda", dtype=dtype)
    outcomes = []
    for way in (add_norm, by_operators):
        normed = way(*inputs, 1e-7, rule, None)
        outcomes.append([normed, *torch.autograd.grad(normed, inputs, sent)])
    for found, wanted in zip(*outcomes, strict=True):
        # The order of sums over a row differs, which moves a number by its last bit here and there.
        assert (found - wanted).float().norm() <= 2 * torch.finfo(dtype).eps * wanted.float().norm()
