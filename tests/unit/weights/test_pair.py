"""A folder with a discriminator and its generator: either of them as a model of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_pair import DISCRIMINATOR, GENERATOR, write_pair

from deberta_xl.base.errors import ConfigError
from deberta_xl.checkpoint.lazy import read_all
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.task_model import TaskModel
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import HeadConfig
from deberta_xl.weights.initial_encoder import find_init, load_encoder, peek_encoder, peek_init
from deberta_xl.weights.initial_weights import load_initial_weights, open_pretrained
from deberta_xl.weights.named_folder import find_pretrained, peek
from deberta_xl.weights.native_config import native_config
from deberta_xl.weights.pair import split_part


@pytest.mark.parametrize("positions", [False, True], ids=["", "positions"])
@pytest.mark.parametrize("sharing", ["gdes", "es", "none"])
def test_the_folder_is_its_discriminator_with_whole_tables(sharing, positions, tmp_path):
    stored = write_pair(tmp_path / "v3", sharing, positions=positions)
    model = open_pretrained(find_pretrained(tmp_path / "v3"), may_be_fresh=True)
    found = read_all(model.tensors)
    for table in ("word", "position"):
        name = f"embeddings.{table}.weight"
        expected = stored[f"generator.{name}"]
        if sharing == "none":
            expected = stored.get(f"discriminator.{name}", torch.zeros_like(expected))
        elif f"discriminator.embeddings.{table}_delta.weight" in stored:
            expected = expected + stored[f"discriminator.embeddings.{table}_delta.weight"]
        assert torch.equal(found[name], expected)
    same = [name for name in stored if name.startswith(("discriminator.encoder.", "discriminator.detector."))]
    assert len(same) > 60
    assert all(torch.equal(found[name.removeprefix("discriminator.")], stored[name]) for name in same)
    assert set(model.fresh) == {name for name in found if name.startswith("head.")} | (
        {"embeddings.position.weight"} if sharing == "none" and not positions else set()
    )


def test_behind_a_slash_it_is_its_generator_a_masked_lm_of_its_own(tmp_path):
    stored = write_pair(tmp_path / "v3")
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "v3" / "generator")
    assert model.config == GENERATOR
    assert all(torch.equal(p, stored[f"generator.{name}"]) for name, p in model.named_parameters())
    assert peek(tmp_path / "v3" / "generator") == (tmp_path / "v3" / "generator", GENERATOR)
    assert peek(tmp_path / "v3" / "discriminator")[1] == peek(tmp_path / "v3")[1] == DISCRIMINATOR


def test_a_folder_that_is_called_generator_is_that_folder(tmp_path):
    DebertaForMaskedLM(DISCRIMINATOR).save_pretrained(tmp_path / "generator")
    assert split_part(tmp_path / "generator") == (tmp_path / "generator", None)
    assert split_part(tmp_path / "nowhere" / "generator") == (tmp_path / "nowhere" / "generator", None)
    with pytest.raises(CheckpointError, match="holds one model, and no generator beside it; leave /generator out"):
        find_and_open(tmp_path / "generator" / "generator")
    with pytest.raises(ConfigError, match="holds one model, and no generator beside it"):
        peek(tmp_path / "generator" / "generator")


def find_and_open(folder: Path) -> object:
    """As a start does."""
    return open_pretrained(find_pretrained(folder))


def test_a_discriminator_fills_no_masks_and_says_what_does(tmp_path):
    write_pair(tmp_path / "v3")
    says = r"fills no masks and writes no text: it finds replaced tokens .*tools/detect\.py .*train\.init="
    with pytest.raises(CheckpointError, match=says) as caught:
        DebertaForMaskedLM.from_pretrained(tmp_path / "v3")
    assert str(caught.value).endswith(str(tmp_path / "v3" / "generator"))


def test_fine_tuning_starts_from_the_discriminator(tmp_path):
    stored = write_pair(tmp_path / "v3")
    head = HeadConfig(kind="classification", num_labels=2)
    folder, architecture = peek_init(tmp_path / "v3")
    peek_encoder(tmp_path / "v3", architecture, head)
    model = TaskModel(architecture, head, seed=5)
    load_encoder(model, find_init(folder), ["no", "yes"])
    table = stored["generator.embeddings.word.weight"] + stored["discriminator.embeddings.word_delta.weight"]
    assert torch.equal(model.embeddings.word.weight, table)
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert torch.equal(parameter, stored[f"discriminator.{name}"])


def test_masked_lm_starts_from_either(tmp_path, caplog):
    stored = write_pair(tmp_path / "v3")
    model = MaskedLanguageModel(DISCRIMINATOR, seed=5)
    load_initial_weights(model, find_pretrained(tmp_path / "v3"))
    assert torch.equal(model.encoder.layers[3].feed_forward.up.weight,
                       stored["discriminator.encoder.layers.3.feed_forward.up.weight"])  # fmt: skip
    assert torch.equal(model.embeddings.position.weight, stored["generator.embeddings.position.weight"])
    model = MaskedLanguageModel(GENERATOR, seed=5)
    load_initial_weights(model, find_pretrained(tmp_path / "v3" / "generator"))
    assert all(torch.equal(p, stored[f"generator.{name}"]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("discriminator.embeddings.word_delta.weight", None), r"no tensor for discriminator\.embeddings\.word_delta"),
        (("generator.embeddings.word.weight", None), r"no tensor for generator\.embeddings\.word\.weight"),
        (("discriminator.embeddings.word_delta.weight", (47, 16)), r"\[47, 16\].* \[48, 16\].*not belong together"),
        (("discriminator.encoder.layers.3.attention_norm.bias", None), r"no tensor for: encoder\.layers\.3"),
        (("discriminator.encoder.more.weight", (1,)), r"no place for: encoder\.more\.weight"),
    ],
    ids=str,
)
def test_half_a_pair_is_refused_by_what_is_missing(change, words, tmp_path):
    name, shape = change
    tensors = write_pair(tmp_path / "v3")
    tensors.pop(name, None)
    tensors |= {name: torch.zeros(shape)} if shape else {}
    (tmp_path / "half").mkdir()
    save_file(tensors, tmp_path / "half" / "model.safetensors")
    config = native_config(DISCRIMINATOR, generator=GENERATOR, sharing="gdes")
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        open_pretrained(tmp_path / "half", may_be_fresh=True)
