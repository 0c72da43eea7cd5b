"""Consoles whose encoding lacks what is printed."""

from __future__ import annotations

import io
import sys

import pytest

from deberta_xl.base.command_line import build_parser, run_tool


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_tool_fails_at_a_character_that_the_console_lacks(monkeypatch, encoding):
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def work(_arguments: object) -> None:
        print("東京 — █ \udc80")
        raise OSError(2, "no such file", "会話\udc80.txt")

    assert run_tool(work, build_parser("Says … it.").parse_args([])) == 2
    with pytest.raises(SystemExit):
        build_parser("Says … 東京.").parse_args(["--help"])
    for stream in streams.values():
        stream.flush()
    shown = {name: stream.buffer.getvalue().decode(encoding) for name, stream in streams.items()}
    expected = "東京 — █ \\udc80\n" if encoding == "utf-8" else "\\u6771\\u4eac"
    assert shown["stdout"].startswith(expected)
    assert shown["stderr"].startswith("error: ")
