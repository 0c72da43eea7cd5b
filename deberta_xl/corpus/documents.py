"""Where a document of a text ends (at blank lines, every line, the file's end, some length), and which are held out."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

DOCUMENTS = {
    "blank_lines": "documents are separated by blank lines",
    "lines": "every line is a document",
    "files": "every file is a document",
    "parts": "long texts are cut into documents of some 2,000 characters, at line ends and spaces where there are any",
}
"""How a .txt file is divided. Of .json and .jsonl every record is a document, which "parts" cuts like other texts."""
PART_CHARACTERS = 2000
BLOCK_BYTES = 2**20
"""Bytes of a file in parts that are handled at a time."""
UNSEEN = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200b\u202f\u205f\u3000\ufeff"
BLANK = re.compile(rb"(?:\s|" + b"|".join(re.escape(space.encode()) for space in UNSEEN) + rb")*")
"""A line that shows nothing: spaces alone, those of East Asian text among them."""


class Record(NamedTuple):
    """A document as it stands in the file, not yet decoded."""

    line: int
    """Number of its first line, from 1."""
    data: bytes | None
    """Its bytes; None when it is too long."""


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out dataset: decided by a hash of its text, so copies stay together."""
    if not share:
        return False
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def filled(lines: Iterator[Record]) -> Iterator[Record]:
    """The lines that are not blank."""
    return (record for record in lines if record.data is None or not BLANK.fullmatch(record.data))


def join_blocks(lines: Iterator[Record], max_bytes: int, *, at_blank_lines: bool = True) -> Iterator[Record]:
    """Runs of lines, ended by blank ones where `at_blank_lines`, and cut where they become longer than `max_bytes`."""
    block: list[bytes] = []
    first, size = 0, 0
    for line, data in lines:
        is_blank = data is not None and BLANK.fullmatch(data) is not None
        is_end = data is None or (is_blank and at_blank_lines) or size + len(data) > max_bytes
        if block and is_end:
            yield Record(first, b"\n".join(block))
            block, size = [], 0
        if data is None:
            yield Record(line, None)
        elif block or not is_blank:
            first = first if block else line
            block.append(data)
            size += len(data) + 1
    if block:
        yield Record(first, b"\n".join(block))


def blocks(file: BinaryIO) -> Iterator[Record]:
    """A file in pieces of about BLOCK_BYTES, whatever the length of its lines; no character is cut through."""
    line, rest = 1, b""
    while data := file.read(BLOCK_BYTES):
        data = data.removeprefix(codecs.BOM_UTF8) if line == 1 and not rest else data
        data = rest + data + file.readline(BLOCK_BYTES)
        end = whole_characters(data)
        data, rest = data[:end], data[end:]
        yield Record(line, data)
        line += data.count(b"\n")
    if rest:
        yield Record(line, rest)


def whole_characters(data: bytes) -> int:
    """Bytes up to the last character of UTF-8 that is there as a whole."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0b1100_0000 != 0b1000_0000:  # the character's first byte says how many follow
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if needed > back else len(data)
    return len(data)


def parts(text: str) -> Iterator[str]:
    """A text in pieces of PART_CHARACTERS at most, cut behind a line end or a space where the second half has one."""
    while len(text) > PART_CHARACTERS:
        places = (text.rfind(mark, PART_CHARACTERS // 2, PART_CHARACTERS) + 1 for mark in ("\n", " "))
        end = next(filter(None, places), PART_CHARACTERS)
        if part := text[:end].strip():
            yield part
        text = text[end:]
    if part := text.strip():
        yield part
