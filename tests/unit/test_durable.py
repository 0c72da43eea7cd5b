"""Files appear whole or not at all."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from deberta_xl.durable import partial, publish, replace_file, write_files


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


def test_contents_files_and_folders_are_written_below_a_folder(tmp_path):
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "b").write_text("b")
    sources = {"a/x": b"x", "whole": tmp_path / "from", "b": tmp_path / "from" / "deep" / "b"}
    assert write_files(tmp_path / "to", sources) == ["a/x", "whole/deep/b", "b"]
    assert (tmp_path / "to" / "whole" / "deep" / "b").read_bytes() == b"b"
