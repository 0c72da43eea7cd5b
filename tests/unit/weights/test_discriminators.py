"""Where a discriminator and its generator begin: from a pair, from a discriminator alone, from a masked-LM model."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from small_pair import DETECTOR, DISCRIMINATOR, GENERATOR, fresh_pair, write_pair
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.native import write_weights
from deberta_xl.weights.native_config import native_config
from deberta_xl.weights.replaced_tokens import load_initial_pair, peek_initial_pair

WORD = "embeddings.word.weight"
KEPT = {0: 0, 1: 3}
"""Layers of the generator, and of the four of the discriminator that they are made of."""


def started(folder: Path, sharing: str, **options: object) -> dict[str, Tensor]:
    """The parameters of two models that begin from a folder."""
    model = fresh_pair(sharing, **options)
    peek_initial_pair(folder, model.discriminator.config, model.generator.config, sharing)
    load_initial_pair(model, find_pretrained(folder))
    return dict(model.named_parameters())


def table_of(parameters: dict[str, Tensor]) -> Tensor:
    """The discriminator's word table."""
    if f"discriminator.{WORD}" in parameters:
        return parameters[f"discriminator.{WORD}"]
    delta = parameters.get("discriminator.embeddings.word_delta.weight", torch.zeros(()))
    return parameters[f"generator.{WORD}"] + delta


def write_one(folder: Path, *, is_discriminator: bool) -> dict[str, Tensor]:
    """A model alone: a discriminator, without a masked-LM head, or a masked-LM model; its tensors."""
    model = MaskedLanguageModel(DISCRIMINATOR, seed=3)
    tensors = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    if is_discriminator:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        tensors |= {f"detector.{name}": torch.randn(shape) for name, shape in DETECTOR.items()}
        tensors["extra.deberta.embeddings.word_embeddings._weight"] = torch.randn(tensors[WORD].shape)
    write_weights(folder, tensors, native_config(DISCRIMINATOR), None)
    return tensors


@pytest.mark.parametrize("sharing", ["gdes", "es", "none"])
def test_a_pair_is_taken_as_it_is(sharing, tmp_path, caplog):
    stored = write_pair(tmp_path / "v3", sharing)
    with caplog.at_level(logging.INFO):
        parameters = started(tmp_path / "v3", sharing)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in parameters.items())
    assert not caplog.records


@pytest.mark.parametrize("there", ["gdes", "none"])
@pytest.mark.parametrize("here", ["gdes", "none"])
def test_tables_keep_their_values_however_they_are_shared(there, here, tmp_path):
    stored = write_pair(tmp_path / "v3", there)
    # a + (b - a) is b but for rounding.
    assert torch.allclose(table_of(started(tmp_path / "v3", here)), table_of(stored), atol=1e-6)


def test_one_table_for_both_is_the_generators_and_that_is_said(tmp_path, caplog):
    stored = write_pair(tmp_path / "v3", "gdes")
    parameters = started(tmp_path / "v3", "es")
    assert torch.equal(parameters[f"generator.{WORD}"], stored[f"generator.{WORD}"])
    assert "shares tables in another way" in caplog.text


@pytest.mark.parametrize("sharing", ["gdes", "none"])
def test_a_discriminator_alone_gives_its_generator_layers_and_tables(sharing, tmp_path, caplog):
    source = write_one(tmp_path / "one", is_discriminator=True)
    fresh = fresh_pair(sharing).generator.head.dense.weight
    parameters = started(tmp_path / "one", sharing)
    assert "is a discriminator without its generator: the generator is made of its layers 0, 3 and" in caplog.text
    assert "its tables, and it lacks a masked-LM head (a new one instead)" in caplog.text
    assert torch.equal(parameters[f"generator.{WORD}"], source[WORD])
    assert torch.equal(parameters["generator.embeddings.position.weight"], source["embeddings.position.weight"])
    assert torch.equal(table_of(parameters), source[WORD])
    if sharing == "gdes":
        assert not parameters["discriminator.embeddings.word_delta.weight"].any()
    check_layers(parameters, source)
    assert all(torch.equal(parameters[f"discriminator.{n}"], t) for n, t in source.items() if n.startswith("detector."))
    assert torch.equal(parameters["generator.head.dense.weight"], fresh)


def test_a_masked_lm_model_gives_its_generator_the_head_and_leaves_the_detector_fresh(tmp_path, caplog):
    source = write_one(tmp_path / "one", is_discriminator=False)
    fresh = {name: torch.zeros(shape) for name, shape in DETECTOR.items()}
    model = fresh_pair("gdes")
    with torch.no_grad():
        for name, parameter in model.discriminator.detector.named_parameters():
            parameter.copy_(fresh[name])
    with caplog.at_level(logging.INFO):
        load_initial_pair(model, find_pretrained(tmp_path / "one"))
    parameters = dict(model.named_parameters())
    check_layers(parameters, source)
    assert all(torch.equal(parameters[f"generator.{n}"], t) for n, t in source.items() if n.startswith("head."))
    assert not any(p.any() for n, p in parameters.items() if "detector" in n)
    assert "has no discriminator.detector.norm.weight, " in caplog.text


def check_layers(parameters: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Each layer of both models is the source's that it should be."""
    for name, tensor in source.items():
        if name.startswith("encoder."):
            assert torch.equal(parameters[f"discriminator.{name}"], tensor)
    for here, there in KEPT.items():
        beginning = f"generator.encoder.layers.{here}."
        own = {n.removeprefix(beginning): p for n, p in parameters.items() if n.startswith(beginning)}
        assert len(own) == 16
        assert all(torch.equal(p, source[f"encoder.layers.{there}.{name}"]) for name, p in own.items())


def test_a_generator_of_other_sizes_begins_fresh_but_for_the_tables(tmp_path, caplog):
    source = write_one(tmp_path / "one", is_discriminator=True)
    narrow = dataclasses.replace(GENERATOR, intermediate_size=8)
    fresh = dict(fresh_pair("gdes", generator=narrow).named_parameters())
    parameters = started(tmp_path / "one", "gdes", generator=narrow)
    assert "the generator has other sizes and begins fresh but for its tables, which are taken" in caplog.text
    assert torch.equal(parameters[f"generator.{WORD}"], source[WORD])
    own = "generator.encoder.layers.1.attention.query_proj.weight"
    assert torch.equal(parameters[own], fresh[own])


def refusal(folder: Path, **options: object) -> str:
    """Why a start from a folder is refused, when it is looked at and when it is made."""
    model = fresh_pair("gdes", **options)
    with pytest.raises(ConfigError) as early:
        peek_initial_pair(folder, model.discriminator.config, model.generator.config, "gdes")
    with pytest.raises(ConfigError) as late:
        load_initial_pair(model, find_pretrained(folder))
    assert str(early.value) == str(late.value)
    return str(early.value)


def test_models_of_other_sizes_are_refused_with_what_to_type(tmp_path):
    write_pair(tmp_path / "v3")
    deeper = dataclasses.replace(GENERATOR, num_layers=3, intermediate_size=8)
    message = refusal(tmp_path / "v3", generator=deeper)
    assert message.endswith("set generator.num_layers=2 generator.intermediate_size=24")
    assert "num_layers is 2 there, 4 here" in refusal(tmp_path / "v3" / "generator")
    write_one(tmp_path / "one", is_discriminator=True)
    message = refusal(tmp_path / "one", generator=dataclasses.replace(GENERATOR, num_layers=5))
    assert message.endswith("a generator of 5 layers cannot be made of 4; set generator.num_layers=2")


@pytest.mark.parametrize(
    ("kind", "gone", "words"),
    [
        ("huggingface", "generator/config.json", "generator has weights, but no config.json or model_config.json"),
        ("huggingface", "generator/model.safetensors", "generator has none of model.safetensors"),
        ("microsoft", "generator_config.json", "generator_config.json, so the discriminator's configuration was taken"),
    ],
)
def test_half_a_generator_is_not_taken_for_none(kind, gone, words, tmp_path):
    write_pair(tmp_path / "v3")
    convert(tmp_path / "v3", tmp_path / kind, Conversion(to=kind))
    (tmp_path / kind / gone).unlink()
    assert words in refusal(tmp_path / kind)


def test_two_models_of_other_vocabularies_are_no_pair(tmp_path):
    tensors = write_pair(tmp_path / "v3")
    for name in (f"generator.{WORD}", "generator.head.bias"):
        tensors[name] = tensors[name][:40].clone()
    partner = dataclasses.replace(GENERATOR, vocab_size=40)
    tensors["discriminator.embeddings.word_delta.weight"] = torch.zeros(40, 16)
    config = native_config(DISCRIMINATOR, generator=partner, sharing="gdes")
    write_weights(tmp_path / "half", tensors, config, None)
    assert "embeddings.word.weight has shape [40, 16], the configuration asks for [48, 16]" in refusal(
        tmp_path / "half"
    )
    tensors["discriminator.embeddings.word.weight"] = torch.zeros(48, 16)
    del tensors["discriminator.embeddings.word_delta.weight"]
    write_weights(tmp_path / "own", tensors, config | {"sharing": "none"}, None)
    assert "the discriminator has 48 ids, the generator 40: they do not belong together" in refusal(tmp_path / "own")
