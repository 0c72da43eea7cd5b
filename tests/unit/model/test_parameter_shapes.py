"""Shapes by arithmetic are those of the real model."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.architecture import DebertaConfig
from deberta_xl.config_file import load_run_config, preset_names
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.parameter_shapes import parameter_shapes

UNEVEN = {"vocab_size": 97, "hidden_size": 24, "num_layers": 3, "num_heads": 3, "intermediate_size": 40}
VARIANTS = [
    {},
    {"conv_kernel_size": 3, "conv_groups": 2},
    {"share_att_key": False, "pos_att_type": "c2p", "normalize_relative_table": False, "position_buckets": 0},
    {"share_att_key": False, "type_vocab_size": 2},
    {"position_biased_input": True, "embedding_size": 16, "head_dim": 5},
]


def shapes_of(config: DebertaConfig) -> dict[str, tuple[int, ...]]:
    """Those of the real model, which is not allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MaskedLanguageModel(config).named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_has_the_shape_that_arithmetic_says(changes):
    config = DebertaConfig(**UNEVEN | changes)
    assert parameter_shapes(config) == shapes_of(config)


@pytest.mark.parametrize("preset", preset_names())
def test_the_presets_too(preset):
    config = load_run_config(preset).model.architecture(128_001)
    assert parameter_shapes(config) == shapes_of(config)
