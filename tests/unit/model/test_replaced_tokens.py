"""Generator and discriminator against the original's outputs, and what flows between them."""

from __future__ import annotations

import pytest
import torch
from pair_vectors import PairVector
from torch import Tensor
from vectors import vector_folders

from deberta_xl.kernels.sampling import DrawRule
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.model.replaced_tokens import Discriminator, ReplacedTokenModel, detection_counts, detection_loss
from deberta_xl.settings.architecture import DebertaConfig

SIZES = {"vocab_size": 37, "hidden_size": 24, "num_layers": 3, "num_heads": 2, "intermediate_size": 40}
CONFIG = DebertaConfig(**SIZES, max_position_embeddings=20, position_buckets=4)
GENERATOR = DebertaConfig(**SIZES | {"num_layers": 2}, max_position_embeddings=20, position_buckets=4)


@pytest.mark.parametrize("folder", vector_folders("rtd"), ids=lambda folder: folder.name)
def test_losses_and_gradients_are_the_originals(folder):
    vector = PairVector(folder)
    # Under shared embeddings the original's discriminator has tables of its own that it never reads.
    assert all("word" in name or "position" in name for name in vector.unread)
    outcome = vector.outcome(vector.model)
    vector.check(outcome, 1e-10)
    outcome.total.backward()
    for name, parameter in vector.model.named_parameters():
        assert (parameter.grad - vector.gradients[name]).abs().max() <= 1e-10, name


def masked_batch() -> tuple[Tensor, Tensor, LabelledPositions]:
    """Two rows, of two documents and of one with padding; some positions are labelled."""
    ids = torch.randint(5, 37, (2, 20), generator=torch.Generator().manual_seed(3))
    segments = torch.tensor([[1] * 9 + [2] * 11, [1] * 15 + [0] * 5])
    labels = torch.zeros_like(ids)
    labels[0, 3], labels[0, 12], labels[1, 7] = 6, 7, 8
    return ids * (segments > 0), segments, LabelledPositions.of(labels)


@pytest.mark.parametrize("sharing", ["gdes", "es"])
@pytest.mark.parametrize("is_input", [False, True], ids=["words", "words and positions"])
def test_tables_are_the_generators_and_gradients_reach_them_only_where_they_are_shared(sharing, is_input):
    configs = [DebertaConfig(**vars(config) | {"position_biased_input": is_input}) for config in (CONFIG, GENERATOR)]
    model = ReplacedTokenModel(*configs, sharing).eval()
    ids, segments, _ = masked_batch()
    before = model("judge", corrupted=ids, segments=segments)
    before.sum().backward()
    tables = [model.generator.embeddings.word.weight, *([model.generator.embeddings.position.weight] * is_input)]
    assert [table.grad is None for table in tables] == [sharing == "gdes"] * len(tables)
    assert all(parameter.grad is not None for parameter in model.discriminator.parameters())
    for table in tables:
        after = model("judge", corrupted=ids, segments=segments)
        with torch.no_grad():
            table.add_(torch.randn_like(table))
        assert not torch.allclose(model("judge", corrupted=ids, segments=segments), after)


def test_without_sharing_the_discriminator_has_a_table_of_its_own():
    model = ReplacedTokenModel(CONFIG, GENERATOR, "none").eval()
    ids, segments, _ = masked_batch()
    before = model("judge", corrupted=ids, segments=segments)
    with torch.no_grad():
        model.generator.embeddings.word.weight.zero_()
    assert torch.equal(model("judge", corrupted=ids, segments=segments), before)
    assert "discriminator.embeddings.position.weight" not in dict(model.named_parameters())


def test_a_delta_begins_at_zero_and_no_layer_of_one_model_begins_as_a_copy_of_the_others():
    model = ReplacedTokenModel(CONFIG, GENERATOR, "gdes", seed=5)
    assert not model.discriminator.embeddings.word_delta.weight.any()
    first, second = (part.encoder.layers[0].attention.query_proj for part in (model.generator, model.discriminator))
    assert not torch.equal(first.weight, second.weight)


def test_the_generator_replaces_labelled_tokens_alone_and_says_which_differ():
    model = ReplacedTokenModel(CONFIG, GENERATOR).eval()
    ids, segments, labelled = masked_batch()
    given = {"input_ids": ids, "segments": segments, "labelled": labelled, "label_count": 1.0}
    proposal = model("propose", **given, draw=DrawRule(torch.tensor([11, 12])))
    place_L = labelled.place_L(20)
    assert place_L.tolist() == [3, 12, 27]
    is_elsewhere = torch.ones(40, dtype=torch.bool).index_fill(0, place_L, value=False)
    assert torch.equal(proposal.corrupted_BS.flatten()[is_elsewhere], ids.flatten()[is_elsewhere])
    drawn_L = proposal.corrupted_BS.flatten()[place_L]
    assert torch.equal(proposal.is_replaced_BS.flatten()[place_L], drawn_L != labelled.label_L)
    assert not proposal.is_replaced_BS.flatten()[is_elsewhere].any()
    assert not torch.equal(
        model("propose", **given, draw=DrawRule(torch.tensor([11, 13]))).corrupted_BS, proposal.corrupted_BS
    )


def test_documents_of_one_row_are_judged_as_each_alone():
    model = Discriminator(CONFIG).eval()
    ids, segments, _ = masked_batch()
    together = model(ids, segments)[0]
    alone = torch.cat([model(ids[:1, :9])[0], model(ids[:1, 9:])[0]])
    torch.testing.assert_close(together, alone)


def test_loss_and_counts_leave_padding_out():
    logits = torch.tensor([[2.0, -1.0, 3.0, 5.0]])
    is_replaced = torch.tensor([[True, True, False, False]])
    segments = torch.tensor([[1, 1, 1, 0]])
    softplus = torch.nn.functional.softplus
    expected = softplus(torch.tensor(-2.0)) + softplus(torch.tensor(1.0)) + softplus(torch.tensor(3.0))
    torch.testing.assert_close(detection_loss(logits, is_replaced, segments), expected)
    counts = detection_counts(logits, is_replaced, segments)
    assert (int(counts["flagged"]), int(counts["hits"])) == (2, 1)


def test_every_parameter_is_in_a_part_of_its_shape():
    for sharing in ("gdes", "es", "none"):
        with torch.device("meta"):
            model = ReplacedTokenModel(CONFIG, GENERATOR, sharing)
        told = {name: p.shape for part in model.parts for name, p in part.named_parameters()}
        assert told == {name: tuple(p.shape) for name, p in model.named_parameters()}
