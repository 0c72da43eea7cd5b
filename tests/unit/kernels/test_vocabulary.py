"""Loss, guesses, draws and gradients in blocks of columns, against the logits of all at once."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.interleaved import peak_bytes
from deberta_xl.kernels import vocabulary_blocks
from deberta_xl.kernels.sampling import draw_tokens
from deberta_xl.kernels.vocabulary import Drawing, Judged, Verdict, Vocabulary, judge, merged
from deberta_xl.kernels.vocabulary_blocks import ALIGNMENT, blocks_of

PIECES, WIDTH, POSITIONS = 901, 24, 37
LABELS = torch.where(torch.arange(POSITIONS) % 5 == 2, 0, torch.arange(POSITIONS) * 25)
LABELS[1:5] = torch.tensor([255, 256, 895, 896])
"""In every block, some at a border; and some positions without one."""
DRAWING = Drawing(torch.arange(POSITIONS), torch.full((POSITIONS,), 2**40 + 7), 0.8)
WHOLE = Vocabulary(PIECES, range(PIECES))


class Given(NamedTuple):
    """States, table and bias."""

    states_LE: Tensor
    table_VE: Tensor
    bias_V: Tensor


def given(dtype: torch.dtype) -> Given:
    """All with gradients."""
    generator = torch.Generator().manual_seed(2)
    shapes = (POSITIONS, WIDTH), (PIECES, WIDTH), (PIECES,)
    return Given(*(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes))


def plainly(inputs: Given) -> Judged:
    """From all logits at once, in at least float32."""
    logits_LV = F.linear(*inputs)
    logits_LV = logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32))
    targets_L = torch.where(LABELS > 0, LABELS, -100)
    loss = F.cross_entropy(logits_LV, targets_L, reduction="sum", ignore_index=-100)
    return Judged(loss, logits_LV.argmax(-1), draw_tokens(logits_LV.detach(), *DRAWING).token_L)


def gradients(loss: Tensor, inputs: Given) -> list[Tensor]:
    """Of a third of the loss."""
    return list(torch.autograd.grad(loss / 3, inputs))


@pytest.fixture(params=[2**25, 256 * POSITIONS], ids=["one block", "blocks of 256"])
def blocks(request, monkeypatch) -> None:
    """One block, or several; a last one to be padded in either case."""
    monkeypatch.setattr(vocabulary_blocks, "ELEMENTS_AT_ONCE", request.param)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_blocks_give_loss_guesses_draws_and_gradients_of_all_logits_at_once(blocks, dtype, tolerance):
    ours, plain = given(dtype), given(dtype)
    found, expected = judge(*ours, LABELS, WHOLE, DRAWING), plainly(plain)
    assert torch.equal(found.guess_L, expected.guess_L)
    assert torch.equal(found.drawn_L, expected.drawn_L)
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0)
    for own, other in zip(gradients(found.loss, ours), gradients(expected.loss, plain), strict=True):
        assert own.dtype == dtype
        assert (own - other).norm() <= tolerance * other.norm()


def test_in_bfloat16_the_gradients_are_as_near_to_those_of_float64_as_all_logits_at_once(blocks):
    exact = Given(*(part.detach().double().requires_grad_() for part in given(torch.bfloat16)))
    expected = gradients(plainly(exact).loss, exact)
    errors = []
    for judged in (lambda inputs: judge(*inputs, LABELS, WHOLE), plainly):
        inputs = given(torch.bfloat16)
        found = gradients(judged(inputs).loss, inputs)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    for own, other in zip(*errors, strict=True):
        assert own <= 1.2 * other


def test_positions_without_a_label_have_no_part_in_loss_or_gradients(blocks):
    inputs = given(torch.float32)
    is_label_L = LABELS > 0
    of_all = judge(*inputs, LABELS, WHOLE)
    fewer = Given(inputs.states_LE[is_label_L].detach().requires_grad_(), *inputs[1:])
    of_labelled = judge(*fewer, LABELS[is_label_L], WHOLE)
    # Sums of more terms, some of which are 0, in another order.
    torch.testing.assert_close(of_all.loss, of_labelled.loss, rtol=1e-6, atol=0)
    states, *others = gradients(of_all.loss, inputs)
    assert not states[~is_label_L].any()
    for own, other in zip([states[is_label_L], *others], gradients(of_labelled.loss, fewer), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_of_equal_logits_the_lowest_id_is_guessed(blocks):
    states_LE, table_VE, bias_V = given(torch.float32)
    bias_V = torch.zeros_like(bias_V).index_fill(0, torch.tensor([130, 300, 900]), 1.0)
    found = judge(states_LE, torch.zeros_like(table_VE), bias_V, LABELS, WHOLE)
    assert found.guess_L.tolist() == [130] * POSITIONS


def test_without_any_label_everything_is_zero(blocks):
    for count in (0, POSITIONS):
        inputs = given(torch.float32)
        inputs = inputs._replace(states_LE=inputs.states_LE[:count].detach().requires_grad_())
        found = judge(*inputs, torch.zeros(count, dtype=torch.int64), WHOLE)
        assert found.loss == 0
        assert found.guess_L.shape == (count,)
        assert not any(gradient.any() for gradient in gradients(found.loss, inputs))


@pytest.mark.parametrize("cuts", [(0, 451, 901), (0, 128, 901, 901)], ids=["two", "three, one of padding alone"])
def test_parts_of_the_vocabulary_find_together_what_the_whole_finds(blocks, cuts):
    """As tensor-parallel ranks: each has some rows of the table, the last ones padding, and joins what all say."""
    inputs = given(torch.float64)
    expected, seen = judge(*inputs, LABELS, WHOLE, DRAWING), []
    parts = [Vocabulary(PIECES, range(a, b)) for a, b in pairwise(cuts)]
    tables = [Given(inputs[0], *(F.pad(p, (*(0, 0) * (p.dim() - 1), 0, 60))[v.columns.start :] for p in inputs[1:]))
              for v in parts]  # fmt: skip

    def note(verdict: Verdict) -> Verdict:
        seen.append(verdict)
        return verdict

    for part, own in zip(parts, tables, strict=True):
        judge(*own, LABELS, Vocabulary(PIECES, part.columns, note), DRAWING)
    together = [
        judge(*own, LABELS, Vocabulary(PIECES, part.columns, lambda _: merged(seen)), DRAWING)
        for part, own in zip(parts, tables, strict=True)
    ]
    for found in together:
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-13, atol=0)
        assert torch.equal(found.guess_L, expected.guess_L)
        assert torch.equal(found.drawn_L, expected.drawn_L)
    # Each rank's gradients are of its own columns; those of the states are summed over the ranks.
    summed = gradients(sum(found.loss for found in together), inputs)
    for own, other in zip(summed, gradients(expected.loss, inputs), strict=True):
        assert (own - other).norm() <= 1e-12 * other.norm()


def test_no_more_logits_exist_than_those_of_a_block(monkeypatch):
    monkeypatch.setattr(vocabulary_blocks, "ELEMENTS_AT_ONCE", 256 * 500)
    states_LE, table_VE, bias_V = (torch.randn(*shape).requires_grad_() for shape in ((500, 8), (8001, 8), (8001,)))
    labels_L = torch.arange(1, 501)

    def step() -> None:
        loss = judge(states_LE, table_VE, bias_V, labels_L, Vocabulary(8001, range(8001))).loss
        torch.autograd.grad(loss, (states_LE, table_VE, bias_V))

    step()
    own, block = (states_LE.numel() + table_VE.numel() + bias_V.numel()) * 4, 256 * 500 * 4
    # Gradients, and a block twice: what is computed in place is; nothing of a quarter of all logits.
    assert peak_bytes(step, torch.device("cpu")) <= 1.5 * own + 2 * block < 500 * 8001 * 4 / 4


@pytest.mark.parametrize(("positions", "pieces"), [(640, 128_100), (8192, 128_100), (64, 504), (10**9, 300), (0, 5)])
def test_blocks_cover_every_column_once_and_only_the_last_is_padded(positions, pieces):
    blocks = blocks_of(positions, pieces)
    assert [column for block in blocks for column in block] == list(range(pieces))
    assert all(len(block) % ALIGNMENT == 0 for block in blocks[:-1])
    assert all(len(block) > 0 for block in blocks)
    assert max(len(block) for block in blocks) * positions <= max(2**25, ALIGNMENT * positions)
