"""How a model was trained goes through every layout with it, and what other worlds compute of it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.card_metadata import CardMetadata
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.layouts import trained_length
from deberta_xl.conversion.model_card import model_card
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native import open_native
from deberta_xl.weights.native_config import Learnt

SMALL = DebertaConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
pytestmark = pytest.mark.filterwarnings("ignore")


def write(folder: Path, learnt: Learnt) -> Path:
    """A native folder of such a model."""
    model = DebertaForMaskedLM(SMALL)
    model.learnt = learnt
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["native", "huggingface", "microsoft"])
@pytest.mark.parametrize("learnt", [Learnt(), Learnt("causal"), Learnt("mixed", "prefix", 24)], ids=str)
def test_it_is_known_there_and_back_again(learnt, kind, tmp_path, caplog):
    source = write(tmp_path / "source", learnt)
    convert(source, tmp_path / "there", Conversion(to=kind))
    assert DebertaForMaskedLM.from_pretrained(tmp_path / "there").learnt == learnt
    convert(tmp_path / "there", tmp_path / "back", Conversion(to="native"))
    assert DebertaForMaskedLM.from_pretrained(tmp_path / "back").learnt == learnt
    says = "the model was trained with train.objective=causal, and"
    assert (says in caplog.text) == (learnt == Learnt("causal") and kind != "native")


def test_the_length_of_its_rows_is_what_an_exported_tokenizer_lets_pass(tmp_path):
    for name, length, passes in (("known", 24, 24), ("unknown", None, SMALL.max_position_embeddings)):
        source = write(tmp_path / name, Learnt(sequence_length=length))
        assert trained_length(open_native(source)) == passes


def test_an_objective_that_is_none_is_refused(tmp_path):
    convert(write(tmp_path / "source", Learnt("causal")), tmp_path / "there", Conversion(to="huggingface"))
    path = tmp_path / "there" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"writing_objective": "novel"}))
    with pytest.raises(CheckpointError, match="objective='novel' is not known"):
        DebertaForMaskedLM.from_pretrained(tmp_path / "there")


@pytest.mark.parametrize(("learnt", "says"), [(Learnt(), "It generates no text."), (Learnt("mixed"), "causal masks.")])
def test_the_card_says_whether_it_writes(learnt, says, tmp_path):
    assert says in model_card(open_native(write(tmp_path, learnt)), None, CardMetadata())
