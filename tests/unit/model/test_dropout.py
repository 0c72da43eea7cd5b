"""Dropout masks are a function of their key and nothing else."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.model.dropout import Dropout, DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig

ONES = torch.ones(200, 500)


def build_model() -> MaskedLanguageModel:
    """A small model with much dropout, in training mode."""
    config = DebertaConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
        max_position_embeddings=32, conv_kernel_size=3, hidden_dropout=0.3, attention_dropout=0.2,
    )  # fmt: skip
    return MaskedLanguageModel(config, seed=2).train()


def gradients(model: MaskedLanguageModel, key: DropoutKey) -> dict[str, torch.Tensor]:
    """Gradients of one fixed batch under the masks of `key`."""
    ids = torch.arange(4, 24).view(1, 20)
    labels = torch.where(ids % 3 == 0, ids, 0)
    model.zero_grad()
    model(ids, labels=labels, dropout_key=key).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_share_kept_and_the_scale_are_right():
    dropped = Dropout(0.3)(ONES, DropoutKey(1))
    kept = (dropped > 0).double().mean().item()
    # 100,000 elements: four standard errors of a share of 0.7 are 0.006.
    assert kept == pytest.approx(0.7, abs=0.006)
    # The rate is rounded to 1/65536, and the scale is that of the rounded one.
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / (1 - 19661 / 65536))]


def test_equal_keys_draw_equal_masks_and_other_keys_others():
    dropout = Dropout(0.5)
    assert torch.equal(dropout(ONES, DropoutKey(7)), dropout(ONES, DropoutKey(7)))
    names = [(1,), (2,), ("a",), ("a", 1), ("a", 2), ("layers", 11), ("layers", 1, 1)]
    masks = [dropout(ONES, DropoutKey(7).fold(*name)) for name in names]
    agreements = [(a == b).double().mean().item() for i, a in enumerate(masks) for b in masks[:i]]
    # Independent masks agree in half of 100,000 elements; five standard errors are 0.008.
    assert max(agreements) < 0.508


def test_nothing_is_drawn_from_the_global_generator_with_a_key():
    model = build_model()
    before = torch.get_rng_state()
    gradients(model, DropoutKey(3))
    assert torch.equal(before, torch.get_rng_state())


def test_recomputed_layers_draw_the_masks_they_drew_before():
    model = build_model()
    expected = gradients(model, DropoutKey(3))
    model.checkpoint_activations()
    actual = gradients(model, DropoutKey(3))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    other = gradients(model, DropoutKey(4))
    assert not torch.equal(expected["head.dense.weight"], other["head.dense.weight"])


def test_the_two_passes_of_the_enhanced_mask_decoder_draw_different_masks():
    model = build_model()
    inputs = []
    layer = model.encoder.layers[-1]
    layer.attention.relative_dropout.register_forward_hook(lambda _m, _a, output: inputs.append(output == 0))
    gradients(model, DropoutKey(3))
    first, second = inputs
    assert not torch.equal(first, second)


def test_evaluation_drops_nothing():
    model = build_model().eval()
    first, second = gradients(model, DropoutKey(3)), gradients(model, DropoutKey(4))
    assert all(torch.equal(first[name], second[name]) for name in first)
