"""Starting a run whose model has another head than the checkpoint's, or than the masked-LM model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.trunk import Trunk
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.initial_weights import computed_by, load_initial_weights, open_pretrained
from deberta_xl.weights.native import write_weights
from deberta_xl.weights.native_config import native_config

CONFIG = DebertaConfig(
    vocab_size=30, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=8, position_buckets=4,
    max_position_embeddings=16,
)  # fmt: skip


class Detector(Trunk):
    """A model of a user's."""

    def __init__(self, seed: int):
        with torch.device("meta"):
            super().__init__(CONFIG)
            self.detect = nn.Linear(CONFIG.hidden_size, 1)
        self.draw_weights(seed)


def saved(model: nn.Module, folder: Path) -> Path:
    """Its weights folder."""
    write_weights(folder, dict(model.named_parameters()), native_config(CONFIG), None)
    return folder


def test_a_head_stays_fresh_where_the_weights_have_none_and_is_taken_by_its_names(tmp_path):
    masked, first, second = MaskedLanguageModel(CONFIG, seed=1), Detector(seed=2), Detector(seed=3)
    own = first.detect.weight.detach().clone()
    load_initial_weights(first, saved(masked, tmp_path / "masked"))
    assert torch.equal(first.embeddings.word.weight, masked.embeddings.word.weight)
    assert torch.equal(first.detect.weight, own)
    load_initial_weights(second, saved(first, tmp_path / "first"))
    assert torch.equal(second.detect.weight, own)
    again = MaskedLanguageModel(CONFIG, seed=4)
    load_initial_weights(again, tmp_path / "first")
    assert torch.equal(again.embeddings.word.weight, masked.embeddings.word.weight)


def test_a_checkpoint_from_before_the_decoder_could_be_chosen_says_nothing_of_it_and_goes_on(tmp_path):
    assert not {name for name in computed_by(CONFIG) if name.startswith("decoder")}
    assert computed_by(CONFIG) == computed_by(replace(CONFIG, decoder_passes=2))
    model = MaskedLanguageModel(CONFIG)
    before = {name: value for name, value in native_config(CONFIG).items() if not name.startswith("decoder")}
    write_weights(tmp_path / "before", dict(model.named_parameters()), before, None)
    assert open_pretrained(tmp_path / "before").config == CONFIG


def test_another_decoder_is_another_architecture_and_named(tmp_path):
    folder = saved(MaskedLanguageModel(CONFIG), tmp_path / "released")
    with pytest.raises(ConfigError, match=r"another architecture: .*decoder_passes is 2 there, 0 here"):
        load_initial_weights(MaskedLanguageModel(replace(CONFIG, decoder_passes=0)), folder)


def test_a_model_that_is_no_trunk_is_told_of_its_own_way(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.init fills a Trunk .*, and ModuleList is none: .* load_initial"):
        load_initial_weights(nn.ModuleList([Detector(seed=2)]), tmp_path)


def test_more_tensors_than_a_model_has_are_refused_in_its_trunk_and_where_no_run_starts(tmp_path):
    model = MaskedLanguageModel(CONFIG)
    model.detect = nn.Linear(8, 1)
    with pytest.raises(CheckpointError, match=r"has no place for: detect\.bias, detect\.weight"):
        open_pretrained(saved(model, tmp_path / "head"))
    model.encoder.more = nn.Linear(8, 1)
    with pytest.raises(CheckpointError, match=r"has no place for: encoder\.more\.bias, encoder\.more\.weight$"):
        open_pretrained(saved(model, tmp_path / "trunk"), may_be_fresh=True)
