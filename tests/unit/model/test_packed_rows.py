"""Several documents in one row are as good as each of them alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deberta_xl.kernels.contract import Where
from deberta_xl.kernels.relative_index import Buckets, rows_in_reach
from deberta_xl.model import part_costs
from deberta_xl.model.embeddings import position_ids
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig

LENGTHS = (11, 17, 7)
PADDING = 5


def build_model(**options: object) -> MaskedLanguageModel:
    """A small model in float64, so that equality can be asked for closely."""
    config = DebertaConfig(
        vocab_size=90, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, position_buckets=8,
        max_position_embeddings=64, conv_kernel_size=3, **options,
    )  # fmt: skip
    return MaskedLanguageModel(config, seed=1).double().eval()


def documents() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids and labels of some documents."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 90, (length,), generator=generator) for length in LENGTHS]
    labels = [torch.where(torch.rand(len(i), generator=generator) < 0.3, i, 0) for i in ids]
    return ids, labels


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, segments and labels of one row that holds them all."""
    ids, labels = documents()
    segments = [torch.full((length,), number) for number, length in enumerate(LENGTHS, 1)]
    padding = torch.zeros(PADDING, dtype=torch.int64)
    return tuple(torch.cat([*parts, padding]).unsqueeze(0) for parts in (ids, segments, labels))


@pytest.mark.parametrize("conv_kernel_size_and_groups", [1, 4])
def test_a_packed_row_gives_the_logits_and_gradients_of_its_documents(conv_kernel_size_and_groups):
    model = build_model(conv_groups=conv_kernel_size_and_groups)
    ids, segments, labels = packed()
    output = model(ids, segments, labels=labels)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = len(output.logits)
    alone = [model(i[None], labels=label[None], label_count=total) for i, label in zip(*documents(), strict=True)]
    sum(o.loss for o in alone).backward()
    torch.testing.assert_close(output.logits, torch.cat([o.logits for o in alone]), rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12, msg=name)


def test_without_segments_documents_do_see_each_other():
    model = build_model()
    ids, segments, labels = packed()
    apart = model(ids, segments, labels=labels).loss
    together = model(ids, (segments > 0).long(), labels=labels).loss
    assert abs(apart - together) > 1e-4


def test_padding_changes_nothing():
    model = build_model()
    ids, segments, labels = packed()
    cut = sum(LENGTHS)
    expected = model(ids[:, :cut], segments[:, :cut], labels=labels[:, :cut]).logits
    torch.testing.assert_close(model(ids, segments, labels=labels).logits, expected, rtol=0, atol=1e-12)


def test_positions_restart_with_each_document_and_not_after_a_gap():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 0, 1, 1, 2, 3, 3]])
    assert position_ids(segments).tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0, 1]]


def test_labelled_positions_are_found_row_by_row():
    labels = torch.tensor([[0, 7, 0, 8], [-100, 0, 0, -100], [9, 0, 0, 0]])
    found = LabelledPositions.of(labels)
    assert found.position_BM.tolist() == [[1, 3], [0, 0], [0, 0]]
    assert found.slot_L.tolist() == [0, 1, 4]
    assert found.label_L.tolist() == [7, 8, 9]
    assert found.place_L(4).tolist() == [1, 3, 8]


def test_labelled_positions_and_slots_are_filled_up_behind_those_that_are():
    labels = torch.tensor([[0, 7, 0, 8], [-100, 0, 0, -100], [9, 0, 0, 0]]).repeat(1, 10)
    found = LabelledPositions.of(labels)
    padded = found.padded(40)
    assert (padded.label_L.shape, padded.position_BM.shape) == ((64,), (3, 32))
    assert (padded.num_labels, padded.padding) == (30, 34)
    assert torch.equal(padded.place_L(40)[:30], found.place_L(40))
    assert torch.equal(padded.row_BM()[:, :20], torch.arange(60).view(3, 20))
    again = padded.without_padding()
    assert (again.label_L.tolist(), again.num_labels) == (found.label_L.tolist(), 30)
    assert found.padded(25).position_BM.shape == (3, 25), "a sequence has no more slots than tokens"
    nothing = LabelledPositions.of(torch.zeros(2, 40, dtype=torch.int64)).padded(40)
    assert (nothing.label_L.shape, nothing.num_labels) == ((64,), 0)
    guess_L = torch.zeros(64, dtype=torch.int64)
    guess_L[:2] = torch.tensor([7, 9])
    assert padded.num_right(guess_L) == 1, "padding is guessed neither right nor wrong"


@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_without_labels_has_a_loss_of_zero_and_zero_gradients(is_training):
    model = build_model().train(is_training)
    ids, segments, labels = packed()
    output = model(ids, segments, labels=torch.zeros_like(labels))
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_sequence_longer_than_the_position_table_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings=64"):
        build_model()(torch.ones(1, 65, dtype=torch.int64))


def test_the_padding_label_minus_100_of_transformers_means_the_same_as_0():
    model = build_model()
    ids, segments, labels = packed()
    foreign = torch.where(labels == 0, -100, labels)
    assert model(ids, segments, labels=foreign).loss == model(ids, segments, labels=labels).loss


@pytest.mark.parametrize("kernel", ["reference", "strided"])
def test_rows_of_the_relative_table_that_no_document_is_long_enough_for_are_not_projected(monkeypatch, kernel):
    model = build_model()
    model.use_kernel(kernel)
    ids, segments, labels = packed()

    def outcome() -> tuple[int, list[torch.Tensor]]:
        with FlopCounterMode(display=False) as counter:
            loss = model(ids, segments, labels=labels).loss
        return counter.get_total_flops(), [loss, *torch.autograd.grad(loss, tuple(model.parameters()))]

    fewer, found = outcome()
    monkeypatch.setattr(Where, "relative_rows", slice(0, model.config.relative_rows))
    all_of_them, expected = outcome()
    # Of the 16 rows, offsets below 17 fall into 13; both kinds of projection, in two layers and two passes of the last.
    assert all_of_them - fewer == (16 - 13) * 2 * 2 * 32 * 32 * 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("buckets", "reach"), [(256, 512), (6, 20), (0, 12)])
def test_they_are_counted_where_the_operations_are(buckets, reach):
    config = DebertaConfig(vocab_size=8, position_buckets=buckets, max_relative_positions=reach)
    for length in (1, 2, 3, 5, 11, 12, 13, 20, 130, 511, 512, 513, 900):
        rows = rows_in_reach(length, Buckets(buckets, config.relative_reach))
        assert part_costs.rows_in_reach(config, length) == rows.stop - rows.start
