"""Text files of people, as text: their encoding, byte-order mark and line ends."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from deberta_xl.base.errors import TaskDataError
from deberta_xl.base.log import rank_zero

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PEEKED = 4096
LATIN_SHARE = 0.1
"""Western European text has fewer letters with accents than this; one of another script, in its own encoding, more."""


def encoding_of(start: bytes, place: str) -> str:
    """The encoding that a file's first bytes state, UTF-8 when they do not.

    Raises TaskDataError for bytes that are no text: of UTF-16 without its mark every other one is zero.
    """
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return encoding
    if b"\0" in start:
        raise TaskDataError(
            f"{place} is not text, or UTF-16 without its byte-order mark; convert it, for example: "
            f"iconv -f UTF-16LE -t UTF-8 {place} > NEW"
        )
    return "utf-8"


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file in UTF-8, or in what its byte-order mark says, without the mark; also a pipe.

    Raises TaskDataError where it is read and is no such text.
    """
    with path.open("rb") as raw:
        encoding = encoding_of(raw.peek(PEEKED)[:PEEKED], str(path))
        try:
            with io.TextIOWrapper(raw, encoding=encoding, newline=newline) as file:
                yield file
        except UnicodeDecodeError as error:
            name = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
            raise TaskDataError(f"{path} is not {name} text: {error}; convert it") from error


def read_text(path: Path) -> str:
    """A whole text file."""
    with open_text(path) as file:
        return file.read()


def lines_of(path: Path) -> list[str]:
    """Lines of a benchmark's text file; only line feeds end one, whatever else Unicode knows."""
    text = read_old_text(path).replace("\r\n", "\n")
    return text.split("\n" if "\n" in text else "\r")  # carriage returns alone: an old Macintosh's


def read_old_text(path: Path) -> str:
    """A text file; old benchmarks come in Latin-1, which is read, with a warning, where a file is not UTF-8.

    Raises TaskDataError where it can be no Western European text, either.
    """
    content = path.read_bytes()
    encoding = encoding_of(content[:PEEKED], str(path))
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        high = sum(byte > 0x7F for byte in content)
        if high > LATIN_SHARE * len(content) or any(0x80 <= byte <= 0x9F for byte in content):
            raise TaskDataError(
                f"{path} is not {encoding.upper()} text: {error}; convert it, for example: "
                f"iconv -f CP1252 -t UTF-8 {path} > NEW (or -f SHIFT_JIS, GB18030, EUC-KR, …)"
            ) from error
        rank_zero("%s is not UTF-8; it is read as Latin-1 (Western European)", path, level=logging.WARNING)
        return content.decode("latin-1")
