"""What is seen under causal and prefix masks, by gradient: exactly nothing of what is not open, and all of what is."""

from __future__ import annotations

import pytest
import torch
from open_masks import MODELS, OPEN, PREFIX, SEGMENTS, build_model, dependence, sees

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels.registry import KERNELS


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "fused"])  # which computes on GPUs
@pytest.mark.parametrize("mask", OPEN)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_no_output_depends_on_what_its_mask_hides_and_each_on_all_that_it_shows(options, mask, kernel):
    model = build_model(**options)
    model.use_kernel(kernel, mask)
    if mask == "prefix":  # the backward pass of half of the models, and so of every kind, sees the layers anew
        model.checkpoint_activations()
    found = dependence(model, SEGMENTS, OPEN[mask])
    is_token = SEGMENTS > 0
    assert torch.equal((found > 0)[is_token], sees(SEGMENTS, OPEN[mask])[is_token])


def test_without_such_a_mask_every_output_depends_on_its_whole_document():
    found = dependence(build_model(conv_kernel_size=3), SEGMENTS, None)
    is_token = SEGMENTS > 0
    assert torch.equal((found > 0)[is_token], sees(SEGMENTS, is_token)[is_token])


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_mask_that_opens_every_token_is_none(options):
    model = build_model(**options)
    ids = torch.arange(4, 32).view(2, 14) * (SEGMENTS > 0)
    with torch.no_grad():
        expected = model(ids, SEGMENTS).logits
        assert torch.equal(model(ids, SEGMENTS, open_BS=torch.ones_like(PREFIX)).logits, expected)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_causal_document_is_read_alike_whatever_follows_in_its_row(options):
    model = build_model(**options)
    ids = torch.arange(4, 32).view(2, 14)
    with torch.no_grad():
        whole = model(ids[1:], SEGMENTS[1:], open_BS=OPEN["causal"][1:]).logits
        for length in (1, 2, 7):
            first = model(ids[1:, :length], open_BS=OPEN["causal"][1:, :length]).logits
            torch.testing.assert_close(first, whole[:, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_labelled_positions_are_decoded_under_the_mask_as_all_positions_are(options):
    model = build_model(**options)
    ids = torch.arange(4, 32).view(2, 14) * (SEGMENTS > 0)
    labels = torch.where((ids % 3 == 0) & (SEGMENTS > 0), ids, 0)
    with torch.no_grad():
        every = model(ids, SEGMENTS, open_BS=PREFIX).logits
        chosen = model(ids, SEGMENTS, labels=labels, open_BS=PREFIX).logits
    torch.testing.assert_close(chosen, every[labels > 0], rtol=0, atol=1e-12)


def test_a_mask_of_pairs_beside_open_tokens_is_refused_with_what_to_do():
    pairs = torch.ones(2, 14, 14)
    with pytest.raises(ConfigError, match=r"\[2, 14, 14\].*leave open_BS out, or give .* as \[batch, sequence\]"):
        build_model()(SEGMENTS, pairs, open_BS=PREFIX)
