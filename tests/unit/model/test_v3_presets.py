"""The presets of DeBERTaV3: sizes, settings and exact parameter counts of both models."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from deberta_xl.model.parts import forward_flops
from deberta_xl.model.replaced_tokens import ReplacedTokenModel
from deberta_xl.planning.workload import masked_lm_workload, replaced_tokens_workload
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.settings.presets import load_run_config


class Released(NamedTuple):
    """A model as microsoft/DeBERTa builds it; the counts are those of its own modules."""

    layers: int
    generator_layers: int
    hidden: int
    heads: int
    generator: int
    """Parameters of the masked-LM generator."""
    trunk: int
    """Parameters below `deberta.` of the discriminator, whose position table nothing reads."""


RELEASED = {
    "v3_xsmall": Released(12, 6, 384, 6, 60_508_644, 70_878_720),
    "v3_small": Released(6, 3, 768, 12, 121_154_148, 141_697_536),
    "v3_base": Released(12, 6, 768, 12, 142_417_764, 184_224_768),
    "v3_large": Released(24, 12, 1024, 16, 284_561_508, 434_536_448),
}
VOCABULARY, MULTILINGUAL = 128_100, 251_000
POSITIONS = 512


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def built(preset: str) -> ReplacedTokenModel:
    """Both models of a preset, without memory."""
    config = load_run_config(preset)
    architecture = config.model.architecture(128_001)
    generator = generator_architecture(architecture, config.generator)
    with torch.device("meta"):
        return ReplacedTokenModel(architecture, generator, config.replaced_tokens.sharing)


def head(hidden: int) -> int:
    """Of the detector: norm, dense and classifier."""
    return 2 * hidden + (hidden * hidden + hidden) + (hidden + 1)


@pytest.mark.parametrize("name", RELEASED)
def test_both_models_have_the_parameters_of_the_released_ones(name):
    expected, model = RELEASED[name], built(name)
    assert count(model.generator) == expected.generator
    # Without the table of positions that the original carries along and never reads; with the detector. The word table
    # counts as what it is, a difference (`word_delta`) of the released table's size.
    assert count(model.discriminator) == expected.trunk - POSITIONS * expected.hidden + head(expected.hidden)
    assert count(model) == count(model.generator) + count(model.discriminator)


def test_the_multilingual_model_is_base_with_more_rows_and_their_biases():
    base, multilingual = built("v3_base"), built("mv3_base")
    more = MULTILINGUAL - VOCABULARY
    assert count(multilingual.generator) - count(base.generator) == more * (768 + 1)
    assert count(multilingual.discriminator) - count(base.discriminator) == more * 768
    assert (count(multilingual.generator), count(multilingual.discriminator)) == (236_927_864, 278_811_649)


def test_the_model_for_long_texts_is_base_with_more_absolute_positions_of_the_generator():
    base, long = built("v3_base"), built("v3_base_8k")
    assert count(long.generator) - count(base.generator) == (8192 - POSITIONS) * 768
    assert count(long.discriminator) == count(base.discriminator)
    assert (count(long.generator), count(long.discriminator)) == (148_316_004, 184_424_449)


@pytest.mark.parametrize("name", [*RELEASED, "mv3_base"])
def test_a_preset_has_the_sizes_of_the_release_and_trains_as_the_paper_says(name):
    config = load_run_config(name)
    released = RELEASED.get(name, RELEASED["v3_base"])
    model, generator = config.model, generator_architecture(config.model.architecture(1), config.generator)
    assert (model.num_layers, model.hidden_size, model.num_heads) == (released.layers, released.hidden, released.heads)
    assert model.intermediate_size == 4 * model.hidden_size
    assert (model.head_size, model.relative_span, model.conv_kernel_size) == (64, 256, 0)
    assert (generator.num_layers, generator.hidden_size) == (released.generator_layers, released.hidden)
    assert config.train.objective == "replaced_tokens"
    assert (config.replaced_tokens.sharing, config.replaced_tokens.weight) == ("gdes", 50)
    assert config.replaced_tokens.training == "decoupled"
    assert (config.data.max_ngram, config.data.replace_with_mask, config.data.replace_with_random) == (1, 1, 0)
    assert (config.train.steps, config.train.global_batch_size, model.sequence_length) == (500_000, 8192, 512)
    assert (config.optimizer.learning_rate, config.optimizer.beta2) == (3e-4 if name == "v3_large" else 5e-4, 0.98)
    assert config.schedule.warmup_steps == 10_000
    assert [config.train.gradient_accumulation_steps(ranks) for ranks in (8, 32, 128)] in ([128, 32, 8], [64, 16, 4])


@pytest.mark.parametrize("name", [*RELEASED, "mv3_base"])
def test_a_step_costs_what_the_guide_says_beside_one_of_masked_language_modelling(name):
    config = load_run_config(name)
    architecture = config.model.architecture(1)
    both, masked = replaced_tokens_workload(architecture, config), masked_lm_workload(architecture, config)
    generator = [part for part in both.parts if part.name.startswith("generator.")]
    assert 1.415 < both.step_flops(1) / masked.step_flops(1) < 1.495
    assert 0.345 < forward_flops(generator, both.example) / forward_flops(both.parts, both.example) < 0.425
    assert 1.645 < both.num_parameters / masked.num_parameters < 1.855
