"""Small files that are something else: said in words wherever one is read, and nobody waits for a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deberta_xl.base import small_file
from deberta_xl.base.errors import UserError
from deberta_xl.base.small_file import read_small
from deberta_xl.checkpoint.folders import make_partial_folder, newest_whole_checkpoint, verify_checkpoint
from deberta_xl.checkpoint.manifest import file_facts, write_manifest
from deberta_xl.checkpoint.tensor_files import read_index
from deberta_xl.data.token_store_format import read_manifest as read_dataset_manifest
from deberta_xl.data.tokenizer_settings import TokenizerSettings
from deberta_xl.run.metrics import drop_lines_after
from deberta_xl.run.ownership import read_owner
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.settings.files import read_toml
from deberta_xl.weights.foreign import read_config_fields
from deberta_xl.weights.head_facts import read_head
from deberta_xl.weights.native_config import read_native_config

READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda path: verify_checkpoint(path.parent, collective=False),
    "config.json": lambda path: read_config_fields(path.parent),
    "native config.json": read_native_config,
    "head.json": lambda path: read_head(path.parent),
    "tokenizer_settings.json": TokenizerSettings.read,
    "train.manifest.json": read_dataset_manifest,
    "model.safetensors.index.json": read_index,
    "run.toml": read_toml,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", ["[" * 200_000, "x" * 5000], ids=["nested", "long"])
def test_brackets_without_end_and_files_without_end_are_refused_in_words(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(small_file, "LIMIT", 1000 if content.startswith("x") else 2**20)
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError):
        READERS[name](path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", sorted(set(READERS) - {"config.json"}))  # which is one only where it is a file
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_nobody_waits_for_a_pipe_or_reads_a_device_to_its_end(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match="should be a file"):
        read_small(path)
    with pytest.raises(UserError):
        READERS[name](path)


def whole_checkpoint(checkpoints: Path, step: int) -> Path:
    """A checkpoint of one file."""
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    write_manifest(folder, {"state.json": file_facts(folder / "state.json")})
    return folder


@pytest.mark.timeout(20)
def test_a_checkpoint_with_a_manifest_that_is_none_is_passed_over_for_an_older_one(tmp_path):
    good = whole_checkpoint(tmp_path, 1)
    for step, content in (
        (2, None),
        (3, "[" * 200_000),
        (4, '{"format": 1, "files": {"a": {"size": 1e999, "sha256": ""}}}'),
    ):
        manifest = whole_checkpoint(tmp_path, step) / "manifest.json"
        manifest.unlink()
        os.mkfifo(manifest) if content is None else manifest.write_text(content)
    loop = whole_checkpoint(tmp_path, 5)
    (loop / "state.json").unlink()
    (loop / "state.json").symlink_to("state.json")
    os.mkfifo(tmp_path / "step-00000006")
    assert newest_whole_checkpoint(tmp_path, collective=False) == good


@pytest.mark.timeout(20)
def test_whatever_stands_in_the_place_of_an_unfinished_save_is_cleared_away(tmp_path):
    (tmp_path / ".step-00000001.a.partial").write_text("a file")
    (tmp_path / ".step-00000001.b.partial").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / ".step-00000001.c.partial")
    (tmp_path / ".step-00000001.d.partial" / "deep").mkdir(parents=True)
    made = make_partial_folder(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.timeout(20)
def test_a_run_folders_own_files_may_be_damaged_in_any_way(tmp_path):
    folder = RunFolder(tmp_path)
    os.mkfifo(folder.latest)
    os.mkfifo(folder.owner)
    folder.check_latest(None)
    assert read_owner(folder.owner) == ""
    for file in (folder.latest, folder.owner):
        file.unlink()
        file.write_bytes(b"\xff\xfe\x00\n")
    folder.check_latest(tmp_path / "step-00000001")
    assert read_owner(folder.owner)
    os.mkfifo(folder.metrics)
    with pytest.raises(UserError, match=r"metrics\.jsonl is a folder, a pipe or a device"):
        drop_lines_after(folder.metrics, 3)
