"""Files appear whole or not at all."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from deberta_xl.base.durable import below, partial, publish, remove, replace_file, write_files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    replace_file(tmp_path / "STATE", "old")
    for what in ("fsync", "replace"):
        with mock.patch.object(os, what, side_effect=OSError(28, "No space left on device")), pytest.raises(OSError):
            replace_file(tmp_path / "STATE", "new")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"STATE": "old"}


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path):
    acts = []
    fsync, replace = os.fsync, os.replace

    def note(descriptor):
        acts.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source, target):
        acts.append("rename")
        replace(source, target)

    with mock.patch.object(os, "fsync", note), mock.patch.object(os, "replace", rename):
        replace_file(tmp_path / "STATE", "done")
        folder = tmp_path / "tokenizer"
        for _ in range(2):  # a folder takes the place of an older one, too
            partial(folder).mkdir()
            (partial(folder) / "model").write_text("m")
            publish(folder)
    above, published = tmp_path.name, ["model", "tokenizer.partial", "rename", tmp_path.name]
    assert acts == ["STATE.partial", "rename", above, *published, *published]
    assert (folder / "model").read_text() == "m"


def test_contents_are_written_below_a_folder(tmp_path):
    sources = {"a/x": b"x", "b": b"b"} | below("whole/deep", {"b": b"deep"})
    assert write_files(tmp_path / "to", sources) == ["a/x", "b", "whole/deep/b"]
    assert (tmp_path / "to" / "whole" / "deep" / "b").read_bytes() == b"deep"


def test_a_folder_that_was_made_read_only_is_removed(tmp_path):
    folder = tmp_path / "folder" / "deep"
    write_files(folder, {"a/x": b"x"})
    (tmp_path / "link").symlink_to(folder)
    for path in (folder / "a", folder, tmp_path / "folder"):
        path.chmod(0o500)
    remove(tmp_path / "folder")
    remove(tmp_path / "link")
    assert list(tmp_path.iterdir()) == []
