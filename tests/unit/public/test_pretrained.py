"""Which checkpoints a run may take its first weights from."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deberta_xl.base.errors import ConfigError, UserError
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.initial_weights import check_same_architecture, load_initial_weights

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


def test_weights_that_are_no_numbers_are_refused_by_name_before_anything_is_trained(tmp_path):
    build(1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layers.1.attention.query_proj.bias"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.attention\.query_proj\.bias holds NaN or infinity"):
        load_initial_weights(build(2), tmp_path)


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


# Values of the optional parts of an architecture, other than those of `build`.
OTHER = {
    "conv_kernel_size": 3, "position_biased_input": True, "type_vocab_size": 2, "normalize_relative_table": False,
    "share_att_key": False, "pos_att_type": "c2p", "position_buckets": 0, "layer_norm_eps": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("is_here", [True, False], ids=["here", "there"])
def test_any_difference_of_architecture_is_named_whichever_side_has_the_part(name, is_here):
    plain, other = build(1).config, build(1, **{name: OTHER[name]}).config
    here, there = (other, plain) if is_here else (plain, other)
    words = f"another architecture: .*{name} is {getattr(there, name)} there, {getattr(here, name)} here"
    with pytest.raises(ConfigError, match=words.replace("|", r"\|")):
        check_same_architecture(here, there, Path("start"))


@pytest.mark.parametrize(("reach", "is_refused"), [(8, True), (16, False)])
def test_another_rule_for_buckets_matters_only_where_sequences_are_longer_than_the_reach(reach, is_refused):
    here, there = build(1, max_relative_positions=reach), build(1, max_relative_positions=reach)
    there = dataclasses.replace(there.config, bucket_rule="transformers")
    with (
        pytest.raises(ConfigError, match="bucket_rule is transformers there, original here")
        if is_refused
        else nullcontext()
    ):
        check_same_architecture(here.config, there, Path("start"))
