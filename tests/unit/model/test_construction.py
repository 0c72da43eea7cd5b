"""Sizes, fresh weights, and what construction depends on."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.presets import load_run_config

PARAMETERS = {
    "base": 184_944_996, "base_8k": 190_843_236, "large": 435_716_196, "xlarge": 887_871_588, "xxlarge": 1_567_828_068,
}  # fmt: skip
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}


def build(seed: int = 0, **options: object) -> MaskedLanguageModel:
    """A small model."""
    return MaskedLanguageModel(DebertaConfig(**{**SMALL, "position_buckets": 8, **options}), seed=seed)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_preset_has_exactly_the_published_number_of_parameters(preset):
    architecture = load_run_config(preset).model.architecture(tokenizer_vocab_size=128_001)
    with torch.device("meta"):
        model = MaskedLanguageModel(architecture)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset]


def test_fresh_weights_have_the_papers_distribution():
    model = build(seed=1, hidden_size=128, conv_kernel_size=3)
    named = dict(model.named_parameters())
    for name in ("embeddings.word.weight", "encoder.layers.0.attention.query_proj.weight", "head.dense.weight"):
        # The standard error of a standard deviation over n elements is sigma / sqrt(2 n); four of them.
        assert named[name].std().item() == pytest.approx(0.02, rel=4 / (2 * named[name].numel()) ** 0.5)
    assert named["embeddings.word.weight"][0].any(), "the padding row is drawn like the others"
    assert not named["head.bias"].any()
    assert (named["head.norm.weight"] == 1).all()
    bound = (128 * 3) ** -0.5
    assert named["encoder.convolution.weight"].abs().max() <= bound


def test_fresh_weights_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = build(seed=5)
    torch.manual_seed(2)
    second = build(seed=5, num_layers=3)
    third = build(seed=6)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.head.dense.weight, third.head.dense.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=32"),
        ({"conv_kernel_size": 2}, "conv_kernel_size=2 must be odd"),
        ({"num_layers": 1}, "num_layers=1"),
        ({"position_buckets": 2000}, "position_buckets=2000"),
        ({"embedding_size": 16}, "embedding_size=16"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_narrow_embeddings_are_projected_to_the_hidden_size():
    model = build(embedding_size=16, position_biased_input=True).eval()
    output = model(torch.arange(4, 14)[None], labels=torch.arange(4, 14)[None])
    output.loss.backward()
    assert output.logits.shape == (10, 60)
    assert model.embeddings.projection.weight.grad.any()


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
