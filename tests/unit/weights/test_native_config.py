"""config.json of a pair of models, and what it says of a model's training: there and back, strictly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import Learnt, NativeConfig, native_config, read_native_config

SMALL = DebertaConfig(vocab_size=30, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=32)
GENERATOR = replace(SMALL, num_layers=2)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"learnt": Learnt("causal")},
        {"learnt": Learnt("mixed", "prefix", 24)},
        {"generator": GENERATOR, "sharing": "gdes", "learnt": Learnt(sequence_length=24)},
    ],
    ids=["alone", "causal", "mixed", "pair"],
)
def test_what_is_said_is_read_back(stated, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(native_config(SMALL, **stated)))
    assert read_native_config(path) == NativeConfig(SMALL, **stated)


@pytest.mark.parametrize(
    ("learnt", "form"),
    [
        (Learnt(), None),
        (Learnt("prefix"), "prefix"),
        (Learnt("mixed"), "causal"),
        (Learnt("mixed", "prefix"), "prefix"),
    ],
    ids=str,
)
def test_a_model_writes_on_in_the_form_it_was_trained_in(learnt, form):
    assert learnt.writes_as == form


def test_a_model_alone_says_nothing_more_than_its_architecture():
    assert not {"generator", "sharing", *Learnt._fields} & native_config(SMALL).keys()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "left_to_right"}, "objective='left_to_right' is not known; known: causal, prefix, mixed"),
        ({"objective": "prefix", "form": "causal"}, "form='causal' belongs to objective='mixed' alone"),
        ({"objective": "mixed", "form": "both"}, "form='both' is not known; known: causal, prefix"),
        ({"sequence_length": "24"}, "sequence_length='24' is no number of tokens"),
        ({"sequence_length": True}, "sequence_length=True is no number of tokens"),
        ({"sequence_length": 0}, "sequence_length=0 is no number of tokens"),
        ({"sharing": "some"}, "sharing='some' is not known; known: gdes, es, none"),
        ({"sharing": ["es"]}, r"sharing=\['es'\] is not known"),
        ({"sharing": "es"}, "generator and sharing go together"),
        ({"generator": {"vocab_size": 30}}, "generator and sharing go together"),
        ({"generator": {}, "sharing": "es"}, "vocab_size is missing"),
        ({"generator": {"vocab_size": 30, "layers": 3}, "sharing": "es"}, "layers"),
        ({"generator": 3, "sharing": "es"}, "generator=3 is no architecture"),
        ({"objectives": "causal"}, "objectives"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(fields, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(native_config(SMALL) | fields))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_native_config(path)
    assert str(path) in str(caught.value)
