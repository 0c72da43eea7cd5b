"""What is seen under causal and prefix masks, by gradient: exactly nothing of what is not open, and all of what is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels.registry import KERNELS
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig

SEGMENTS = torch.tensor([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])
#: The first two tokens of a document, all of one and none of another.
PREFIX = torch.tensor([[1, 1, 0, 0, 0] + [0] * 8, [1] * 4 + [0] * 9]).bool()
OPEN = {"causal": torch.zeros_like(PREFIX), "prefix": PREFIX}
#: Every kind of layer there is: shared and own projections of positions, one term and two, n-grams, grouped and wider,
#: rows for each distance, the decoder and absolute positions in the input instead of it.
MODELS = {
    "v3": {},
    "convolution": {"conv_kernel_size": 3},
    "wide_convolution_in_groups": {"conv_kernel_size": 5, "conv_groups": 4},
    "own_position_projections": {"share_att_key": False, "position_buckets": 0},
    "c2p": {"pos_att_type": "c2p"},
    "positions_in_the_input": {"position_biased_input": True, "type_vocab_size": 2, "conv_kernel_size": 3},
}


def build_model(**options: object) -> MaskedLanguageModel:
    """Three layers in float64."""
    sizes = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24, "position_buckets": 4}
    config = DebertaConfig(vocab_size=40, max_position_embeddings=16, **(sizes | options))
    return MaskedLanguageModel(config, seed=2).double().eval()


def sees(segments: Tensor, open_tokens: Tensor) -> Tensor:
    """Which pairs of tokens (i, j) the rule lets see each other, by its words."""
    batch, length = segments.shape
    pairs = torch.zeros(batch, length, length, dtype=torch.bool)
    for row, i, j in torch.cartesian_prod(*map(torch.arange, pairs.shape)).tolist():
        is_together = segments[row, i] == segments[row, j] > 0
        pairs[row, i, j] = is_together and (j <= i or bool(open_tokens[row, j]))
    return pairs


def dependence(model: MaskedLanguageModel, segments: Tensor, open_tokens: Tensor | None) -> Tensor:
    """Largest derivative of the logits at each token i with respect to the embedding of each j, [B, S, S]."""
    ids = torch.randint(4, 40, segments.shape, generator=torch.Generator().manual_seed(0)) * (segments > 0)
    leaves = []

    def become_leaf(_module: torch.nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    with model.embeddings.register_forward_hook(become_leaf):
        logits = model(ids, segments, open_BS=open_tokens).logits
    weighted = (logits * torch.linspace(0.5, 1.5, logits.shape[-1], dtype=logits.dtype)).sum(-1)
    rows = [torch.autograd.grad(weighted[:, i].sum(), leaves[0], retain_graph=True)[0] for i in range(len(ids[0]))]
    return torch.stack(rows, dim=1).abs().amax(-1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mask", OPEN)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_no_output_depends_on_what_its_mask_hides_and_each_on_all_that_it_shows(options, mask, recomputes, kernel):
    model = build_model(**options)
    model.use_kernel(kernel, mask)
    if recomputes:
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
    ids = torch.arange(4, 30).view(2, 13) * (SEGMENTS > 0)
    with torch.no_grad():
        expected = model(ids, SEGMENTS).logits
        assert torch.equal(model(ids, SEGMENTS, open_BS=torch.ones_like(PREFIX)).logits, expected)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_causal_document_is_read_alike_whatever_follows_in_its_row(options):
    model = build_model(**options)
    ids = torch.arange(4, 30).view(2, 13)
    with torch.no_grad():
        whole = model(ids[1:], SEGMENTS[1:], open_BS=OPEN["causal"][1:]).logits
        for length in (1, 2, 7):
            first = model(ids[1:, :length], open_BS=OPEN["causal"][1:, :length]).logits
            torch.testing.assert_close(first, whole[:, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_labelled_positions_are_decoded_under_the_mask_as_all_positions_are(options):
    model = build_model(**options)
    ids = torch.arange(4, 30).view(2, 13) * (SEGMENTS > 0)
    labels = torch.where((ids % 3 == 0) & (SEGMENTS > 0), ids, 0)
    with torch.no_grad():
        every = model(ids, SEGMENTS, open_BS=PREFIX).logits
        chosen = model(ids, SEGMENTS, labels=labels, open_BS=PREFIX).logits
    torch.testing.assert_close(chosen, every[labels > 0], rtol=0, atol=1e-12)


def test_a_mask_of_pairs_beside_open_tokens_is_refused_with_what_to_do():
    pairs = torch.ones(2, 13, 13)
    with pytest.raises(ConfigError, match=r"\[2, 13, 13\].*leave open_BS out, or give .* as \[batch, sequence\]"):
        build_model()(SEGMENTS, pairs, open_BS=PREFIX)
