"""The estimate of memory counts what the model has."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.architecture import DebertaConfig
from deberta_xl.config_file import load_run_config, preset_names
from deberta_xl.memory import GIB, count_parameters, estimate_memory
from deberta_xl.model.masked_lm import MaskedLanguageModel

UNEVEN = {"vocab_size": 97, "hidden_size": 24, "num_layers": 3, "num_heads": 3, "intermediate_size": 40}
SIZES = {"micro_batch_size": 8, "sequence_length": 512}
VARIANTS = [
    {},
    {"conv_kernel_size": 3, "conv_groups": 2},
    {"share_att_key": False, "pos_att_type": "c2p", "normalize_relative_table": False, "position_buckets": 0},
    {"type_vocab_size": 2, "position_biased_input": True, "embedding_size": 16, "head_dim": 5},
]


def number_of(config: DebertaConfig) -> int:
    """Parameters of the real model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaskedLanguageModel(config).parameters())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_are_counted_as_they_are(changes):
    config = DebertaConfig(**UNEVEN | changes)
    assert count_parameters(config) == number_of(config)


@pytest.mark.parametrize("preset", preset_names())
def test_parameters_of_the_presets_are_counted_as_they_are(preset):
    config = load_run_config(preset).model.architecture(128_001)
    assert count_parameters(config) == number_of(config)


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(1, 2 + 4 + 12 / 8), (2, 2 + 4 / 8 + 12 / 8), (3, 18 / 8)])
def test_the_zero_stage_says_what_is_divided(stage, bytes_per_parameter):
    config = load_run_config("xxlarge").model.architecture(128_001)
    layout = {"data_parallel_size": 8, "tensor_parallel_size": 1, "recomputes": False}
    memory = estimate_memory(config, zero_stage=stage, precision="bf16", **SIZES, **layout)
    assert memory.states == pytest.approx(bytes_per_parameter * count_parameters(config) / GIB)


def test_recomputation_and_tensor_parallelism_save_activations():
    config = load_run_config("xxlarge").model.architecture(128_001)
    options = {"zero_stage": 1, "precision": "bf16", "data_parallel_size": 8, **SIZES}
    plain, recomputed, divided = (
        estimate_memory(config, tensor_parallel_size=size, recomputes=recomputes, **options).activations
        for size, recomputes in ((1, False), (1, True), (2, False))
    )
    assert recomputed < 0.2 * plain
    assert 0.5 * plain < divided < plain
