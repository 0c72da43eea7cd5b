"""From one phase to the next, by the ordinary commands: what begins with what, and what is said of it.

The second phase learns nothing (its rate is too small for any weight), so its weights are those it began with.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_dataset import SmallDataset
from small_task import finetune_arguments, write_sentences
from test_finetune import train as finetune
from test_pretrain_command import arguments, train_in_process
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.public.detection import DebertaForDetection
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.weights.initial_weights import read_pretrained
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.native import find_weights_folder, read_weights

STILL = ["optimizer.learning_rate=1e-30", "train.steps=1", "evaluation.interval=10", "schedule.warmup_steps=0"]
SHORT = ["train.steps=3", "evaluation.interval=10", "optimizer.learning_rate=1e-2"]
REPLACED = ["train.objective=replaced_tokens", "model.num_layers=4"]
WORD = "embeddings.word.weight"
DELTA = "discriminator.embeddings.word_delta.weight"


@pytest.fixture(scope="module")
def runs(small_dataset: SmallDataset, tmp_path_factory) -> Path:
    """A run of replaced tokens (`v3`), and what was exported of it without its generator (`released`)."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(small_dataset, folder / "v3", *REPLACED, *SHORT)
    convert(folder / "v3" / "discriminator", folder / "released", Conversion(to="huggingface"))
    return folder


def pretrain(dataset: SmallDataset, folder: Path, *overrides: str, num_ranks: int = 1) -> dict[str, Tensor]:
    """A run that ends well; its last weights, as stored."""
    given = arguments(dataset, folder, *overrides)
    assert set(run_ranks(train_in_process, num_ranks, given, backend=None)) == {"done"}
    return read_weights(find_weights_folder(folder))


def start_of(folder: Path) -> dict[str, Tensor]:
    """A model's weights under plain names."""
    return read_pretrained(find_pretrained(folder), may_be_fresh=True)[1]


def assert_taken(weights: dict[str, Tensor], source: dict[str, Tensor], beginning: str, prefix: str = "") -> None:
    """All weights whose names begin so are the source's."""
    names = [name for name in weights if name.startswith(prefix + beginning)]
    assert len(names) > 3
    assert [name for name in names if not torch.equal(weights[name], source[name.removeprefix(prefix)])] == []


def test_fine_tuning_begins_with_the_discriminator(runs, tmp_path):
    sentences = write_sentences(tmp_path / "sentences")
    given = finetune_arguments(runs / "v3", sentences, tmp_path / "task", *STILL[:2])
    assert run_ranks(finetune, 1, given, backend=None, timeout=400) == ["done"]
    weights, source = read_weights(find_weights_folder(tmp_path / "task")), start_of(runs / "v3")
    assert_taken(weights, source, "encoder.")
    assert torch.equal(weights[WORD], source[WORD])


@pytest.mark.parametrize("part", [pytest.param("", marks=pytest.mark.full), "generator"])
def test_masked_lm_begins_with_either(part, runs, small_dataset, tmp_path, caplog):
    layers = "model.num_layers=2" if part else "model.num_layers=4"
    init = runs / "v3" / part
    weights = pretrain(small_dataset, tmp_path / "run", *STILL, layers, f"train.init={init}")
    source = start_of(init)
    assert_taken(weights, source, "encoder.")
    assert_taken(weights, source, "embeddings.")
    read_inputs(parse_arguments(arguments(small_dataset, tmp_path / "again", *STILL, layers, f"train.init={init}")))
    assert ("lacks a masked-LM head (a new one instead)" in caplog.text) == (not part)
    if part:
        assert_taken(weights, source, "head.")


@pytest.mark.parametrize("source", ["released", *(pytest.param(s, marks=pytest.mark.full) for s in ("v3", "mlm"))])
def test_replaced_tokens_begin_with_a_pair_a_discriminator_or_a_masked_lm_model(
    source, runs, small_dataset, tmp_path, caplog
):
    if source == "mlm":
        pretrain(small_dataset, runs / "mlm", "model.num_layers=4", *SHORT)
    settings = [*STILL, *REPLACED, f"train.init={runs / source}"]
    weights = pretrain(small_dataset, tmp_path / "run", *settings, num_ranks=2 if source == "released" else 1)
    there = start_of(runs / source)
    assert_taken(weights, there, "encoder.", "discriminator.")
    assert torch.equal(weights[f"generator.{WORD}"] + weights[DELTA], there[WORD])
    if source == "v3":
        assert_taken(weights, start_of(runs / source / "generator"), "", "generator.")
    else:
        assert weights[DELTA].abs().max() <= 1e-20  # the one update
        made = {name.replace("layers.3", "layers.1"): t for name, t in there.items() if "layers.1" not in name}
        assert_taken(weights, made, "encoder.", "generator.")
    read_inputs(parse_arguments(arguments(small_dataset, tmp_path / "again", *settings)))
    said = {"released": "is a discriminator without its generator", "mlm": "is one model, and no pair"}
    assert re.search("the generator is made of its layers 0, 3 and its tables", caplog.text) or source == "v3"
    assert said.get(source, "") in caplog.text


def test_what_does_not_fit_is_refused_before_the_run(runs, small_dataset, tmp_path):
    refused = {
        ("train.objective=replaced_tokens", "model.num_layers=4", "generator.num_layers=3"): "generator.num_layers=2$",
        ("train.objective=replaced_tokens", "model.num_layers=3"): "num_layers is 4 there, 3 here",
        ("model.num_layers=2",): "num_layers is 4 there, 2 here",
    }
    for settings, words in refused.items():
        given = arguments(small_dataset, tmp_path / "run", *settings, f"train.init={runs / 'v3'}")
        with pytest.raises(ConfigError, match=words):
            read_inputs(parse_arguments(given))
    assert not (tmp_path / "run").exists()


def test_a_run_fills_masks_finds_replaced_tokens_and_is_converted_as_the_two(runs, tmp_path):
    assert DebertaForMaskedLM.from_pretrained(runs / "v3" / "generator").config.num_layers == 2
    assert DebertaForDetection.from_pretrained(runs / "v3").config.num_layers == 4
    convert(runs / "v3", tmp_path / "native", Conversion(to="native", tolerance=0.0))
    stored, converted = (read_weights(find_weights_folder(folder)) for folder in (runs / "v3", tmp_path / "native"))
    assert stored.keys() == converted.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in stored.items())
