"""The sections of the objectives: the generator that follows from the discriminator, and what is refused, in words."""

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import GeneratorSection, generator_architecture
from deberta_xl.settings.presets import load_run_config

RTD = "train.objective=replaced_tokens"
DISCRIMINATOR = DebertaConfig(vocab_size=50, hidden_size=96, num_layers=5, num_heads=3, intermediate_size=192)

BAD = {
    ("generator.num_layers=3",): "train.objective=masked_lm does not read it: set train.objective=replaced_tokens",
    ("replaced_tokens.weight=10",): "replaced_tokens.weight=10.0 is set",
    ("autoregressive.share=0.3",): "set train.objective=mixed",
    (RTD, "autoregressive.share=0.3"): "train.objective=replaced_tokens does not read it",
    ("autoregressive.share=0",): "share=0.0 must lie between 0 and 1",
    ("autoregressive.share=1",): "share=1.0 must lie between 0 and 1",
    (RTD, "replaced_tokens.weight=0"): "weight=0.0 must be greater than 0",
    (RTD, "replaced_tokens.weight=-1"): "weight=-1.0 must be greater than 0",
    (RTD, "replaced_tokens.weight=inf"): "weight=inf",
    (RTD, "replaced_tokens.temperature=0"): "temperature=0.0 must be greater than 0",
    (RTD, "replaced_tokens.sharing=nes"): "sharing='nes'",
    (RTD, "replaced_tokens.sharing=es"): "set replaced_tokens.training=joint",
    (RTD, "generator.hidden_size=64"): "generator's tables are 64 wide and the discriminator's 128",
    (RTD, "generator.hidden_size=33", "replaced_tokens.sharing=none"): "set generator.num_heads",
    (RTD, "generator.num_layers=1"): "generator.num_layers=1:",
    (RTD, "generator.num_heads=5"): "generator.num_heads=5 does not divide hidden_size=128",
    (RTD, "optimizer.learning_rate=0", "generator.learning_rate=1e-4"): "optimizer.learning_rate, which is 0",
    (RTD, "generator.learning_rate=-1"): "learning_rate=-1.0 is too small",
    (RTD, "generator.learning_rate=1e39"): "generator.learning_rate=1e+39 is too large; it must be at most 1e+30",
    (RTD, "generator.num_layers=1000000"): "generator.num_layers=1000000 is too large; it must be at most 10000",
    (RTD, "replaced_tokens.weight=nan"): "weight=nan",
    (
        RTD,
        "replaced_tokens.weight=1e39",
    ): "replaced_tokens.weight=1e+39 is beyond float32; it must lie in 1e-30 … 1e+30",
    (RTD, "replaced_tokens.temperature=1e-300"): "replaced_tokens.temperature=1e-300 is beyond float32",
}


@pytest.mark.parametrize("overrides", BAD)
def test_what_cannot_be_is_refused(overrides):
    with pytest.raises(ConfigError) as refused:
        load_run_config("debug", overrides)
    assert BAD[overrides] in str(refused.value)


def test_an_objective_of_ones_own_may_read_any_section():
    config = load_run_config("debug", ["train.objective=mine:Mine", "generator.num_layers=3"])
    assert config.generator.num_layers == 3


def test_the_generator_has_half_of_the_layers_and_is_otherwise_as_the_discriminator():
    found = generator_architecture(DISCRIMINATOR, GeneratorSection())
    assert found == DebertaConfig(vocab_size=50, hidden_size=96, num_layers=2, num_heads=3, intermediate_size=192)


def test_a_narrower_generator_keeps_the_size_of_a_head_and_its_proportions():
    found = generator_architecture(DISCRIMINATOR, GeneratorSection(hidden_size=32, num_layers=4))
    assert (found.num_layers, found.hidden_size, found.num_heads, found.intermediate_size) == (4, 32, 1, 64)
