"""Which checkpoints a run may take its first weights from."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.architecture import DebertaConfig
from deberta_xl.errors import ConfigError
from deberta_xl.pretrained import DebertaForMaskedLM, load_initial_weights

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
SIZES = {"position_buckets": 4, "max_position_embeddings": 16}


def build(seed: int, **options: object) -> DebertaForMaskedLM:
    """A small model without convolution."""
    return DebertaForMaskedLM(DebertaConfig(**{**SMALL, **SIZES, **options}), seed=seed)


@pytest.mark.parametrize(
    "options",
    [
        # The released models without a convolution state none of its settings, which then read otherwise than ours.
        {"conv_act": "tanh"},
        {"hidden_dropout": 0.3, "attention_dropout": 0.0},
        {"head_dim": 8, "embedding_size": 16, "max_relative_positions": 16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_weights_are_taken_from_a_model_that_computes_the_same(tmp_path, options):
    source = build(1, **options)
    source.save_pretrained(tmp_path / "source")
    model = build(2)
    load_initial_weights(model, tmp_path / "source")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_relative_positions": 8}, "max_relative_positions is 8 there, 16 here"),
        ({"hidden_act": "relu"}, "hidden_act is relu there, gelu here"),
        ({"num_heads": 4}, "num_heads is 4 there, 2 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_a_model_that_computes_something_else_are_refused_in_words(tmp_path, options, words):
    build(1, **options).save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigError, match=words):
        load_initial_weights(build(2), tmp_path / "source")
