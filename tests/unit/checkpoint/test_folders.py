"""Finding the newest whole checkpoint among damaged ones, and deleting old ones."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

from deberta_xl.base.durable import write_files
from deberta_xl.checkpoint.folders import newest_whole_checkpoint, prune_checkpoints, verify_checkpoint
from deberta_xl.checkpoint.manifest import CheckpointError, file_facts, step_folder_name, write_manifest

FILES = [
    "config.json",
    "manifest.json",
    "rank-00000.safetensors",
    "rank-00001.safetensors",
    "state.json",
    "tokenizer/spm.model",
]


def flip_a_bit(path: Path, chance: random.Random) -> None:
    """Change one bit anywhere in a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    """Cut a file anywhere."""
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def remove(path: Path, _: random.Random) -> None:
    """Delete a file."""
    path.unlink()


def lengthen(path: Path, _: random.Random) -> None:
    """Add a byte to a file."""
    path.write_bytes(path.read_bytes() + b"}")


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, alone."""
    return newest_whole_checkpoint(checkpoints, collective=False)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove, lengthen])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_noticed_and_the_checkpoint_before_is_used(tmp_path, caplog, name, damage):
    whole, _ = write_checkpoint(tmp_path, 1)
    damaged, _ = write_checkpoint(tmp_path, 2)
    intact = (damaged / name).read_bytes()
    for seed in range(8 if damage in (flip_a_bit, truncate) else 1):
        caplog.clear()
        damage(damaged / name, random.Random(seed))
        with caplog.at_level(logging.WARNING, logger="deberta_xl"):
            assert newest(tmp_path) == whole
        assert "step-00000002" in caplog.text
        assert ("manifest" if name == "manifest.json" else Path(name).name) in caplog.text
        assert f"using the newest whole checkpoint instead: {whole}" in caplog.text
        (damaged / name).write_bytes(intact)
        assert newest(tmp_path) == damaged


def test_every_single_changed_bit_of_a_manifest_is_noticed(tmp_path):
    folder = tmp_path / "step-00000001"
    names = write_files(folder, {"state.json": b"{}", "tokenizer/spm.model": b"pieces"})
    write_manifest(folder, {name: file_facts(folder / name) for name in names})
    verify_checkpoint(folder, collective=False)
    content = (folder / "manifest.json").read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            (folder / "manifest.json").write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify_checkpoint(folder, collective=False)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"[]", b"{}", b'"files"', b"null", b"\xff\xfe", b'{"format": 1, "files": []}', b"\0" * 100],
)
def test_a_manifest_that_is_none_is_called_damaged(tmp_path, content):
    folder, _ = write_checkpoint(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000001/manifest.json (is damaged|: format)"):
        newest(tmp_path)


def test_a_manifest_of_a_later_format_says_so(tmp_path):
    folder, _ = write_checkpoint(tmp_path, 1)
    (folder / "manifest.json").write_text('{"format": 2, "files": {}}')
    with pytest.raises(CheckpointError, match="format 2 is not 1"):
        newest(tmp_path)


def name_in_manifest(outside: Callable[[Path], str]) -> Callable[[Path], None]:
    """A damage: the manifest names, with right size and hash, a file that lies elsewhere."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][outside(folder)] = manifest["files"]["state.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def link_in_folder(folder: Path) -> None:
    """A damage: a file of the checkpoint is a link to one elsewhere with the same content."""
    (folder / "state.json").rename(folder.parent / "elsewhere.json")
    (folder / "state.json").symlink_to(folder.parent / "elsewhere.json")


@pytest.mark.parametrize(
    "damage",
    [
        name_in_manifest(lambda folder: "../state.json"),
        name_in_manifest(lambda folder: "tokenizer/../../state.json"),
        name_in_manifest(lambda folder: str(folder.parent / "state.json")),
        name_in_manifest(lambda folder: ""),
        name_in_manifest(lambda folder: "."),
        name_in_manifest(lambda folder: "state\0.json"),
        link_in_folder,
    ],
    ids=["parent", "inner parent", "absolute", "empty", "folder", "nul", "link"],
)
def test_a_manifest_that_points_outside_its_folder_is_refused_and_nothing_there_is_read(tmp_path, damage):
    folder, _ = write_checkpoint(tmp_path, 1)
    (tmp_path / "state.json").write_bytes((folder / "state.json").read_bytes())
    damage(folder)
    with pytest.raises(CheckpointError, match="lies outside its folder: not read"):
        newest(tmp_path)


def test_a_half_written_folder_is_passed_over(tmp_path, caplog):
    whole, _ = write_checkpoint(tmp_path, 1)
    (tmp_path / step_folder_name(2)).mkdir()
    (tmp_path / step_folder_name(2) / "rank-00000.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING, logger="deberta_xl"):
        assert newest(tmp_path) == whole
    assert "step-00000002/manifest.json is missing: the checkpoint was never finished" in caplog.text


def test_with_several_damaged_checkpoints_the_newest_whole_one_is_found(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    for step in (3, 4):
        (tmp_path / step_folder_name(step) / "state.json").unlink()
    assert newest(tmp_path) == tmp_path / step_folder_name(2)


def test_with_none_whole_there_is_an_error_that_names_every_damage_and_the_way_out(tmp_path):
    for step in (1, 2):
        folder, _ = write_checkpoint(tmp_path, step)
        (folder / "config.json").write_bytes(b"{ }")
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path)
    message = str(caught.value)
    assert "none of the 2 checkpoints" in message
    for step in (1, 2):
        assert f"{step_folder_name(step)}/config.json is damaged: it has 3 bytes, the manifest states 2" in message
    assert "start from step 0" in message


@pytest.mark.parametrize("exists", [True, False])
def test_without_any_checkpoint_there_is_none(tmp_path, exists, caplog):
    checkpoints = tmp_path if exists else tmp_path / "checkpoints"
    assert newest(checkpoints) is None
    assert caplog.text == ""


def test_starting_anew_beside_an_unfinished_save_is_said(tmp_path, caplog):
    (tmp_path / ".step-00000001.partial").mkdir()
    with caplog.at_level(logging.WARNING, logger="deberta_xl"):
        assert newest(tmp_path) is None
    assert "holds only unfinished saves (.step-00000001.partial)" in caplog.text


def test_folders_that_are_not_named_like_a_step_are_ignored(tmp_path):
    whole, _ = write_checkpoint(tmp_path, 1)
    for name in ("step-2", "step-00000002.old", "step-000000003", "latest", "step-0000000x"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == whole


@pytest.mark.parametrize("step", [-1, 100_000_000])
def test_a_step_without_a_folder_name_is_refused(step):
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        step_folder_name(step)


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (5, [1, 2, 3]), (0, [1, 2, 3])])
def test_pruning_keeps_the_newest(tmp_path, keep, left):
    folders = [write_checkpoint(tmp_path, step)[0] for step in (1, 2, 3)]
    prune_checkpoints(folders[-1], keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_folder_name(step) for step in left]


def test_pruning_does_not_count_a_later_damaged_checkpoint(tmp_path):
    folders = [write_checkpoint(tmp_path, step)[0] for step in (1, 2, 3)]
    (folders[2] / "state.json").unlink()
    prune_checkpoints(folders[1], keep=1)
    assert newest(tmp_path) == folders[1]
    assert not folders[0].exists()
