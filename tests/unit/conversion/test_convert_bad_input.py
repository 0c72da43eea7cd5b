"""What must not be converted is refused with the name of the file or tensor; nothing runs, nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deberta_xl.base.errors import DataError
from deberta_xl.base.lock import one_writer
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.edits import Edits
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign_config import to_huggingface_config

SIZES = {"vocab_size": 40, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 12}
CONFIG = DebertaConfig(**SIZES, position_buckets=4, max_position_embeddings=16)
QUERY = "deberta.encoder.layer.1.attention.self.query_proj.weight"


@pytest.fixture
def source(tmp_path) -> Path:
    """A whole Hugging Face folder."""
    DebertaForMaskedLM(CONFIG).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "source", Conversion(to="huggingface"))
    return tmp_path / "source"


def complaint(source: Path, **options: object) -> str:
    """Why a conversion is refused; nothing beside the source has changed."""
    before = sorted(path for path in source.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        convert(source, source.parent / "destination", Conversion(**{"to": "native", **options}))
    assert sorted(path for path in source.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the weights."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors")


# Tensors


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.update({QUERY: torch.zeros(8, 9)}), "layers.1.attention.query_proj.weight has shape [8, 9]"),
        (lambda t: t.update({QUERY: torch.zeros(64)}), "query_proj.weight has shape [64]"),
        (lambda t: t.update({QUERY: torch.zeros(8, 8, dtype=torch.int64)}), "has type torch.int64"),
        (lambda t: t.pop(QUERY), "no tensor for: encoder.layers.1.attention.query_proj.weight"),
        (lambda t: t.pop("deberta.embeddings.LayerNorm.bias"), "no tensor for: embeddings.norm.bias"),
        (lambda t: t.pop("lm_predictions.lm_head.bias"), "no tensor for: head.bias"),
        (lambda t: t.update({"deberta.encoder.layer.1.gate.weight": torch.zeros(3)}), "deberta.encoder.layer.1.gate"),
        (lambda t: t.update({QUERY.replace(".1.", ".2."): torch.zeros(8, 8)}), "encoder.layers.2.attention.query_proj"),
        (lambda t: t.update({"optimizer.step": torch.zeros(1)}), "optimizer.step"),
        (lambda t: t.update({"cls.predictions.bias": torch.zeros(40)}), "two spellings of one tensor"),
        (lambda t: t[QUERY].view(-1)[5:6].fill_(float("nan")), "encoder.layers.1.attention.query_proj.weight"),
        (lambda t: t["lm_predictions.lm_head.bias"][3:4].fill_(float("inf")), "head.bias"),
    ],
    ids=["shape", "flat", "integers", "missing", "missing norm", "half a head", "unknown", "layer too many", "other",
         "twice", "NaN", "infinity"],
)  # fmt: skip
def test_a_tensor_that_does_not_belong_is_named(source, edit, words):
    change(source, edit)
    message = complaint(source)
    assert words in message
    assert "source" in message


def test_a_nan_that_arrives_late_leaves_nothing_behind_in_any_layout(source):
    change(source, lambda tensors: tensors["lm_predictions.lm_head.bias"][3:4].fill_(float("nan")))
    for kind, options in (("huggingface", {"shard_bytes": 2000}), ("microsoft", {}), ("native", {"tolerance": 1.0})):
        assert "NaN or infinity" in complaint(source, to=kind, **options)


# Files


def test_every_truncation_of_a_safetensors_file_is_refused_by_name(source):
    whole = (source / "model.safetensors").read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (source / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors is damaged" in complaint(source)


@pytest.mark.parametrize("length", [2**63, 2**31, 10])
def test_a_header_that_lies_about_its_length_is_refused(source, length):
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", length) + whole[8:])
    assert "model.safetensors is damaged" in complaint(source)


class Payload:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("hidden_in", ["value", "key", "metadata"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "pickle"])
def test_a_program_in_a_pickle_is_not_run(source, tmp_path, hidden_in, is_zip):
    tensors: dict[object, object] = dict(load_file(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    payload = Payload(tmp_path / "executed")
    content = {
        "value": {**tensors, QUERY: payload},
        "key": {**tensors, ("k", payload): 1},
        "metadata": [tensors, payload],
    }[hidden_in]
    if is_zip:
        torch.save(content, source / "pytorch_model.bin")
    else:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    message = complaint(source)
    assert "pytorch_model.bin" in message
    assert "a pickle can run any program" in message
    assert not (tmp_path / "executed").exists()


def test_a_program_in_a_generator_is_not_run_either(source, tmp_path):
    table = "deberta.embeddings.word_embeddings"
    change(source, lambda tensors: tensors.update({f"{table}._weight": tensors.pop(f"{table}.weight")}))
    torch.save({"a": Payload(tmp_path / "executed")}, source / "pytorch_model.generator.bin")
    assert "pytorch_model.generator.bin" in complaint(source)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_place_of_the_tokenizer_is_not_even_copied(source, tmp_path):
    (source / "bpe_encoder.bin").write_bytes(pickle.dumps(Payload(tmp_path / "executed"), protocol=2))
    convert(source, tmp_path / "copy", Conversion(to="microsoft"))
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["model_config.json", "pytorch_model.bin"]
    assert not (tmp_path / "executed").exists()


# Shards


@pytest.fixture
def sharded(source, tmp_path) -> Path:
    """The same model in several files."""
    convert(source, tmp_path / "sharded", Conversion(to="huggingface", shard_bytes=3000))
    return tmp_path / "sharded"


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    """Rewrite the index of the shards."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../native/model.safetensors",
        "/etc/passwd",
        "..",
        "a/../../b.safetensors",
        "x\\y.safetensors",
        "x\0.safetensors",
        "evil.bin",
        "",
    ],
)
def test_an_index_cannot_name_files_elsewhere(sharded, name):
    edit_index(sharded, lambda table: table.update({QUERY: name}))
    assert "which is no .safetensors file beside it: not read" in complaint(sharded)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda table: table.update({QUERY: "model-00099-of-00099.safetensors"}), "00099.safetensors is missing"),
        (lambda table: table.pop(QUERY), f"holds {QUERY}, which model.safetensors.index.json does not name"),
        (lambda table: table.update({QUERY: table["lm_predictions.lm_head.bias"]}), QUERY),
        (lambda table: table.update({"more": table[QUERY]}), "lacks more"),
        (lambda table: table.clear(), "must map tensors to file names"),
    ],
    ids=["missing file", "unnamed tensor", "wrong file", "missing tensor", "empty"],
)
def test_index_and_shards_must_agree(sharded, edit, words):
    edit_index(sharded, edit)
    assert words in complaint(sharded)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b"\xff"])
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json" in complaint(sharded)


def test_shards_without_their_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "not the index of the shards" in complaint(sharded)


# Options and destinations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source_kind": "native"}, "--from native: "),
        ({"edits": Edits(average=3)}, "--average: "),
        ({"source_kind": "microsoft", "to": "microsoft", "shard_bytes": 5}, "--max_shard_size"),
        ({"with_card": True}, "--model_card"),
    ],
)
def test_options_that_contradict_are_refused(source, options, words):
    assert words in complaint(source, **options)


def test_a_file_of_a_native_folder_is_refused_in_favour_of_the_folder(source):
    assert "give the folder" in complaint(source.parent / "native" / "model.safetensors")


def test_a_folder_of_another_model_is_refused(source):
    (source / "config.json").write_text(json.dumps(to_huggingface_config(CONFIG) | {"model_type": "bert"}))
    assert "'bert'" in complaint(source)


def test_the_source_is_not_its_own_destination(source):
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, source, Conversion(to="huggingface"))
    assert (source / "model.safetensors").exists()


def test_two_conversions_into_one_folder_do_not_mix(source, tmp_path):
    with one_writer(tmp_path / ".destination.lock"), pytest.raises(DataError, match="another process"):
        convert(source, tmp_path / "destination", Conversion(to="native"))
    assert not (tmp_path / "destination").exists()


def test_what_a_killed_conversion_left_is_replaced(source, tmp_path):
    (tmp_path / ".destination.partial").mkdir()
    (tmp_path / ".destination.partial" / "rest").write_text("half")
    convert(source, tmp_path / "destination", Conversion(to="native"))
    assert not (tmp_path / "destination" / "rest").exists()
    assert not (tmp_path / ".destination.partial").exists()
