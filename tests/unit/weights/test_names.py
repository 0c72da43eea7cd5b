"""Names and configuration fields at the border, there and back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign_config import from_foreign_config, to_huggingface_config
from deberta_xl.weights.names import PREFIXES, from_microsoft, to_microsoft

SMALL = DebertaConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
LAYOUTS = {
    "v2 with convolution": {"conv_kernel_size": 3},
    "own position projections": {"share_att_key": False, "normalize_relative_table": False, "position_buckets": 0},
    "c2p only": {"share_att_key": False, "pos_att_type": "c2p"},
    "everything in the input": {"position_biased_input": True, "type_vocab_size": 2, "embedding_size": 8},
    "a decoder of its own": {"decoder_weights": "own", "share_att_key": False},
}
# A value other than the default for every field.
OTHER_VALUES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "head_dim": 4,
    "intermediate_size": 48,
    "embedding_size": 8,
    "max_position_embeddings": 600,
    "max_relative_positions": 400,
    "position_buckets": 0,
    "bucket_rule": "transformers",
    "pos_att_type": "c2p",
    "share_att_key": False,
    "normalize_relative_table": False,
    "position_biased_input": True,
    "decoder_passes": 1,
    "decoder_weights": "own",
    "decoder_input": "states",
    "type_vocab_size": 2,
    "conv_kernel_size": 5,
    "conv_groups": 2,
    "conv_act": "relu",
    "hidden_act": "relu",
    "hidden_dropout": 0.2,
    "attention_dropout": 0.3,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.01,
}


def names_of(config: DebertaConfig) -> list[str]:
    """Every parameter's name."""
    with torch.device("meta"):
        return [name for name, _ in MaskedLanguageModel(config).named_parameters()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_has_a_foreign_name_of_its_own_that_leads_back(layout):
    names = names_of(dataclasses.replace(SMALL, **LAYOUTS[layout]))
    foreign = [to_microsoft(name) for name in names]
    assert len(set(foreign)) == len(names)
    assert [from_microsoft(name) for name in foreign] == names


def test_the_layouts_together_use_every_prefix_of_the_table():
    names = {to_microsoft(n) for layout in LAYOUTS.values() for n in names_of(dataclasses.replace(SMALL, **layout))}
    unused = [theirs for theirs in PREFIXES.values() if not any(n.startswith(theirs.partition("#")[0]) for n in names)]
    assert not unused


@pytest.mark.parametrize(
    "name",
    ["cls.predictions.bias", "deberta.encoder.layer.x.output.dense.weight", "deberta.embeddings.LayerNorm.gamma", ""],
)
def test_a_foreign_tensor_that_is_no_parameter_has_no_name_of_ours(name):
    assert from_microsoft(name) is None


def test_an_unknown_parameter_of_ours_is_named_in_the_error():
    with pytest.raises(KeyError, match=r"encoder\.layers\.0\.adapter\.weight"):
        to_microsoft("encoder.layers.0.adapter.weight")


def test_the_list_of_other_values_covers_every_field():
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(DebertaConfig)}
    assert all(getattr(SMALL, name) != value for name, value in OTHER_VALUES.items())


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_a_configuration_field_survives_the_way_there_and_back(field):
    needed = {"position_biased_input": True} if field == "embedding_size" else {}
    config = dataclasses.replace(SMALL, **{field: OTHER_VALUES[field]}, **needed)
    back = from_foreign_config(to_huggingface_config(config))
    # The foreign side states the width of a head; ours may leave it to be derived.
    assert back == dataclasses.replace(config, head_dim=config.head_size)


def test_the_absent_fields_of_an_old_release_mean_what_they_meant_there():
    old = {"vocab_size": 30, "relative_attention": True, "pos_att_type": "c2p|p2c", "max_relative_positions": -1}
    config = from_foreign_config(old)
    assert (config.share_att_key, config.position_biased_input, config.position_buckets) == (False, True, 0)
    assert (config.conv_act, config.normalize_relative_table, config.relative_reach) == ("tanh", False, 512)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"relative_attention": False}, "relative_attention"),
        ({"relative_attention": False, "pos_att_type": "p2c"}, "relative_attention=False, but pos_att_type='p2c'"),
        ({"relative_attention": True}, "pos_att_type is absent"),
        ({"relative_attention": True, "pos_att_type": ["p2p", "c2p"]}, "pos_att_type"),
    ],
)
def test_a_configuration_that_is_no_deberta_of_ours_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_foreign_config({"vocab_size": 30, **fields})
