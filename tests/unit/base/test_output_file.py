"""Outputs: files appear whole, devices and pipes stay what they are, inputs are never lost."""

from __future__ import annotations

import importlib
import os
import stat
import threading
from pathlib import Path

import pytest

from deberta_xl.base.command_line import run_tool
from deberta_xl.base.errors import ConfigError
from deberta_xl.base.output_file import check_output, check_output_folder, is_stream, open_output, write_output


def test_a_file_appears_whole_and_the_old_one_is_left_after_a_failure(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    path.chmod(0o600)
    with pytest.raises(TypeError), open_output(path) as file:
        file.writelines(["half", None])
    assert path.read_text() == "old"
    write_output(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o600)
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_symbolic_link_stays_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_stays_a_pipe_and_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    check_output(tmp_path / "pipe")
    write_output(tmp_path / "pipe", "東京\n")
    reader.join(10)
    assert read == ["東京\n"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert is_stream(Path("/dev/null"))
    check_output(Path("/dev/null"))


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd", "link"])
def test_a_descriptor_is_written_to_where_it_stands(tmp_path, folder):
    (tmp_path / "log").write_text("before\n")
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_APPEND)
    try:
        path = Path(folder) / str(descriptor)
        if folder == "link":
            path = tmp_path / "stdout"
            path.symlink_to(f"/proc/self/fd/{descriptor}")
        check_output(path)
        write_output(path, "after\n")
    finally:
        os.close(descriptor)
    assert (tmp_path / "log").read_text() == "before\nafter\n"


@pytest.mark.parametrize("name", ["in.txt", "sub/../in.txt", "hard", "soft"])
def test_an_output_that_is_an_input_is_refused_under_every_name(tmp_path, name):
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    os.link(tmp_path / "in.txt", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("in.txt")
    with pytest.raises(ConfigError, match="is read as an input"):
        check_output(tmp_path / name, [tmp_path / "other", tmp_path / "in.txt"])


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a folder; choose the name of a file"):
        check_output(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder .*; make it \(mkdir -p "):
        check_output(tmp_path / "missing" / "out")
    for folder in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"choose (a|another) folder"):
            check_output_folder(tmp_path / folder)
    check_output_folder(tmp_path / "new" / "below")
    if Path("/proc/version").exists():
        with pytest.raises(ConfigError, match="no file can be made in /proc"):
            check_output(Path("/proc/out"))
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_file_of_a_folder_that_is_read_is_not_replaced(tmp_path):
    (tmp_path / "model" / "best").mkdir(parents=True)
    (tmp_path / "model" / "best" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model" / "best")
    for output in ("model/best/config.json", "link/config.json"):
        with pytest.raises(ConfigError, match=r"is a file of .*/model, which is read, and would be lost"):
            check_output(tmp_path / output, [tmp_path / "model"])
    check_output(tmp_path / "model" / "new.jsonl", [tmp_path / "model"])


TOOLS = {
    "predict": ("run", "no_model --input in.jsonl --output {}"),
    "preprocess": ("run", "--input in.jsonl --tokenizer none --output {}"),
    "train_tokenizer": ("train", "--input in.jsonl --vocab_size 99 --output {}"),
    "convert": ("run", "--to native no_model {}"),
}
REFUSED = {
    "predict": {"in.jsonl": "is read as an input", "no/x": "there is no folder"},
    "preprocess": {"in.jsonl/x": "is a file", "pipe": "is a device or a pipe"},
    "train_tokenizer": {"in.jsonl/x": "is a file", "in.jsonl": "is a file"},
    "convert": {"in.jsonl/x": "is a file", "pipe": "is a file"},
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_notices_its_output_before_its_work(tmp_path, monkeypatch, capsys, tool):
    work, command = TOOLS[tool]
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "x"}\n')
    functions = vars(importlib.import_module(f"tools.{tool}"))
    os.mkfifo("pipe")
    for output, message in REFUSED[tool].items():
        arguments = command.format(output).split()
        assert run_tool(functions[work], functions["parse_arguments"](arguments)) == 2
        assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == ["in.jsonl", "pipe"]
    assert Path("in.jsonl").read_text() == '{"text": "x"}\n'
