"""Folders of the original release and of Hugging Face that are damaged, incomplete, or not what they seem."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign_config import to_huggingface_config
from deberta_xl.weights.names import to_microsoft

SIZES = {"vocab_size": 40, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 12}
CONFIG = DebertaConfig(**SIZES, position_buckets=4, max_position_embeddings=16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder in the original release's layout."""
    model = DebertaForMaskedLM(CONFIG)
    torch.save({to_microsoft(n): p.detach() for n, p in model.named_parameters()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface_config(CONFIG)))
    return tmp_path


def complaint(folder: Path) -> str:
    """Why the folder is refused, in one line."""
    with pytest.raises(CheckpointError) as caught:
        DebertaForMaskedLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_whole_folder_loads(folder):
    assert DebertaForMaskedLM.from_pretrained(folder).config.num_layers == 2


class Payload:
    """Makes a file when it is unpickled without care."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "pickle"])
def test_a_program_in_a_pickle_is_not_run_and_nobody_is_advised_to_run_it(folder, is_zip):
    content = {"deberta.x": Payload(folder / "executed")}
    if is_zip:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    message = complaint(folder)
    assert "a pickle can run any program" in message
    assert "weights_only" not in message
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"lm_predictions.lm_head.bias": 3}, {5: torch.zeros(2)}])
def test_a_file_of_other_things_than_named_tensors_is_refused(folder, content):
    torch.save(content, folder / "pytorch_model.bin")
    assert "no table of named tensors" in complaint(folder)


@pytest.mark.parametrize("size", [0, 4, 500, -100])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_truncated_file_is_refused_by_name(folder, name, size):
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / name).write_bytes(whole[:size])
    assert name in complaint(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_size": 16}, "has shape"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 is too large"),
        ({"num_hidden_layers": 10**4}, "10000 layers are configured, the weights have fewer"),
        ({"max_relative_positions": "x"}, "max_relative_positions"),
        ({"position_buckets": [1]}, "position_buckets"),
        ({"pos_att_type": 3}, "pos_att_type=3 is not supported"),
        ({"pos_att_type": [3]}, "is not supported"),
        ({"relative_attention": False}, "relative_attention"),
        ({"model_type": "bert"}, "'bert'"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_nonsense_in_the_configuration_is_named(folder, fields, words):
    (folder / "config.json").write_text(json.dumps(to_huggingface_config(CONFIG) | fields))
    assert words in complaint(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_a_configuration_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in complaint(folder)


def test_a_native_folder_without_its_configuration_or_with_half_of_it_is_refused(tmp_path):
    DebertaForMaskedLM(CONFIG).save_pretrained(tmp_path / "native")
    config = tmp_path / "native" / "config.json"
    config.write_text('{"model_type": "deberta_xl"}')
    assert "vocab_size is missing" in complaint(tmp_path / "native")
    config.unlink()
    assert "config.json is missing" in complaint(tmp_path / "native")
