"""Weights read without an engine, from every kind of native folder, and written whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from small_checkpoint import no_file_larger_than, write_checkpoint

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.weights.native import find_weights_folder, read_weights, write_weights

WEIGHTS = {"embedding.weight": torch.arange(6.0).view(2, 3), "norm.bias": torch.zeros(3, dtype=torch.bfloat16)}


def write_example(tmp_path, name="weights"):
    """A weights folder with a tokenizer."""
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    (tmp_path / "tokenizer" / "vocab.json").write_bytes(b"pieces")
    write_weights(tmp_path / name, WEIGHTS, {"model_type": "deberta_xl"}, tmp_path / "tokenizer")
    return tmp_path / name


def flip_last_bit(path):
    """Damage a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def assert_same(actual, expected):
    """The same names, shapes, types and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


def test_a_weights_folder_gives_back_what_was_written(tmp_path):
    folder = write_example(tmp_path)
    assert_same(read_weights(find_weights_folder(folder)), WEIGHTS)
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "deberta_xl"}
    assert (folder / "tokenizer" / "vocab.json").read_bytes() == b"pieces"


def test_master_weights_are_put_together_from_a_checkpoint(tmp_path):
    folder, state = write_checkpoint(tmp_path, 1)
    assert find_weights_folder(folder) == folder
    assert_same(read_weights(folder), state["master"])


def test_a_run_folder_stands_for_its_newest_whole_checkpoint(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    _, first = write_checkpoint(checkpoints, 1)
    second, state = write_checkpoint(checkpoints, 2)
    assert_same(read_weights(find_weights_folder(tmp_path / "run")), state["master"])
    flip_last_bit(second / "rank-00001.safetensors")
    assert_same(read_weights(find_weights_folder(tmp_path / "run")), first["master"])


def test_a_run_without_checkpoints_and_other_folders_are_told_apart(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        find_weights_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has neither model.safetensors \(weights\)"):
        find_weights_folder(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        find_weights_folder(tmp_path / "nowhere")


def test_a_damaged_checkpoint_named_by_the_user_is_refused(tmp_path):
    folder, _ = write_checkpoint(tmp_path, 1)
    flip_last_bit(folder / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is damaged"):
        find_weights_folder(folder)


def test_a_damaged_weights_folder_is_refused(tmp_path):
    folder = write_example(tmp_path)
    flip_last_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: its sha256"):
        find_weights_folder(folder)


def test_the_configuration_of_a_weights_folder_may_be_edited(tmp_path):
    folder = write_example(tmp_path)
    (folder / "config.json").write_text("{}")
    assert find_weights_folder(folder) == folder


def test_a_truncated_weights_file_without_a_manifest_is_refused(tmp_path):
    folder = write_example(tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_weights(find_weights_folder(folder))


def test_an_existing_folder_is_not_overwritten_but_an_empty_one_is_filled(tmp_path):
    folder = write_example(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write_example(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "prepared").mkdir()
    assert_same(read_weights(write_example(tmp_path, "prepared")), WEIGHTS)


def test_a_full_disk_leaves_no_weights_folder(tmp_path):
    with no_file_larger_than(100), pytest.raises(CheckpointError, match=r"weights cannot be written: .*too large"):
        write_example(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]


def test_reading_weights_does_not_import_deepspeed():
    program = "import sys, deberta_xl.weights.native; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
