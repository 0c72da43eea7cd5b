"""Reading a corpus document by document, in bounded memory: .txt, .jsonl and .json, each also .gz and .zst.

* `.jsonl`, `.json`: one document per line, under the key `text` (or another one); or a list of such objects, or objects
  over several lines, whichever of the two endings the file has.
* `.txt`: documents are separated by blank lines, as BERT's and RoBERTa's pretraining text was, unless a user says
  otherwise (`documents.py`). A document of more than 16 MiB is cut at a line end.

Records that hold no text (invalid JSON, a missing key, a wrong type, not UTF-8, a line of more than 16 MiB) are bad:
the reader says which and why, and the caller counts them or stops.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from deberta_xl.base.errors import CorpusError
from deberta_xl.corpus.compressed import READ_ERRORS, CountingFile, unpacked
from deberta_xl.corpus.documents import Record, blocks, filled, join_blocks, parts
from deberta_xl.corpus.json_stream import is_spread, values_of

FORMATS = (".txt", ".jsonl", ".json")
COMPRESSIONS = (".gz", ".zst")
#: Longest line, and longest document of a .txt file, in bytes.
MAX_DOCUMENT_BYTES = 16 * 2**20
#: Bytes by which a file is told to be UTF-8, and a list or lines.
PEEKED = 4096


class BadRecord(ValueError):
    """A record that holds no text; the message says why."""


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and glob patterns name (`**` crosses folders), sorted, each once.

    Raises CorpusError for a pattern without a match, a folder, an unknown suffix.
    """
    files: set[Path] = set()
    for pattern in map(os.path.expanduser, patterns):
        found = glob.glob(pattern, recursive=True) or ([pattern] if Path(pattern).exists() else [])
        if not found:
            raise CorpusError(f"--input {pattern}: no such file; quote patterns, for example --input 'corpus/*.jsonl'")
        files.update(map(Path, found))
    for path in files:
        if path.is_dir():
            raise CorpusError(f"--input {path} is a folder; name the files in it, for example --input '{path}/*.jsonl'")
        format_of(path)
    return sorted(files)


def format_of(path: Path) -> str:
    """`.txt` or `.jsonl`; CorpusError for anything else."""
    suffixes = path.suffixes[:-1] if path.suffix in COMPRESSIONS else path.suffixes
    if not suffixes or suffixes[-1] not in FORMATS:
        allowed = ", ".join(kind + packed for kind in FORMATS for packed in ("", *COMPRESSIONS))
        raise CorpusError(f"{path}: unknown kind of text file; allowed: {allowed}")
    return suffixes[-1]


class TextFile:
    """An input file, opened for reading its records once. Use as a context."""

    def __init__(self, path: Path, documents: str = "blank_lines"):
        self.path = path
        self.documents = documents
        self.kind = format_of(path)
        self.file = CountingFile(path)
        self.stream = unpacked(self.file, path.suffix)

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    @property
    def num_bytes(self) -> int:
        """Bytes read from the disk so far."""
        return self.file.num_bytes

    def records(self) -> Iterator[Record]:
        """The documents of the file, raw; blank lines are skipped. CorpusError when the file turns out damaged."""
        try:
            start = self.stream.peek(PEEKED)[:PEEKED]
            refuse_other_encodings(start, self.path)
            if self.kind != ".txt" and is_spread(start):
                yield from self.spread_records()
                return
            yield from filled(numbered_lines(self.stream)) if self.kind != ".txt" else self.text_records()
        except READ_ERRORS as error:
            raise CorpusError(
                f"{self.path} is damaged or not what its name says: {error}; fetch or pack it again"
            ) from error

    def text_records(self) -> Iterator[Record]:
        """The documents of a .txt file."""
        if self.documents == "parts":
            return blocks(self.stream)
        lines = numbered_lines(self.stream)
        if self.documents == "lines":
            return filled(lines)
        return join_blocks(lines, MAX_DOCUMENT_BYTES, at_blank_lines=self.documents == "blank_lines")

    def texts(self, record: Record, json_key: str) -> list[str]:
        """The documents of a record of this file; BadRecord when it holds none."""
        return texts_of(record, self.kind, json_key, self.documents)

    def spread_records(self) -> Iterator[Record]:
        """The objects of a list, or that take several lines. CorpusError for what is not valid JSON: nothing after it
        can be told apart."""
        try:
            for line, text, _ in values_of(self.stream, max_characters=MAX_DOCUMENT_BYTES):
                yield Record(line, text.encode())
        except ValueError as error:
            raise CorpusError(f"{self.path}, {error}") from None

    def summary(self) -> dict[str, Any]:
        """Name, size and SHA-256 of the file, once all its records are read."""
        return {"name": self.path.name, "size": self.num_bytes, "sha256": self.file.sha256.hexdigest()}


def refuse_other_encodings(start: bytes, path: Path) -> None:
    """Raise CorpusError for UTF-16 and UTF-32, with or without a byte-order mark, by a file's first bytes."""
    is_wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    if is_wide or start.count(b"\0") > len(start) // 10:
        raise CorpusError(
            f"{path} is UTF-16 or UTF-32, or no text; UTF-8 is read. Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW"
        )


def numbered_lines(file: BinaryIO) -> Iterator[Record]:
    """The lines of a file with their numbers, without line ends or byte-order mark; None for one that is too long."""
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        is_too_long = len(line) > MAX_DOCUMENT_BYTES
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_DOCUMENT_BYTES)):
            is_too_long = True
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield Record(number, None if is_too_long else line.rstrip(b"\r\n"))


def texts_of(record: Record, kind: str, json_key: str, documents: str) -> list[str]:
    """The documents of a record of a file of that `kind`; BadRecord when it holds none."""
    text = text_of(record, kind, json_key)
    return list(parts(text)) if documents == "parts" else [text]


def text_of(record: Record, kind: str, json_key: str) -> str:
    """The text of a record of a file of that `kind`; BadRecord when it holds none."""
    if record.data is None:
        raise BadRecord(f"a line of more than {MAX_DOCUMENT_BYTES // 2**20} MiB")
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    return text if kind == ".txt" else text_of_json(text, json_key)


def text_of_json(line: str, json_key: str) -> str:
    """The text under `json_key` of one JSON line; BadRecord when there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"invalid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"a JSON {type(value).__name__}, not an object with the key {json_key!r}")
    if json_key not in value:
        keys = ", ".join(map(repr, list(value)[:5])) or "none"
        raise BadRecord(f"no key {json_key!r} (keys: {keys})")
    text = value[json_key]
    if not isinstance(text, str):
        raise BadRecord(f"{json_key!r} is of type {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{json_key!r} holds half of a surrogate pair, which is no character") from None
    return text


def iterate_documents(
    paths: Sequence[Path],
    json_key: str = "text",
    documents: str = "blank_lines",
    *,
    report: Callable[[str], None] = lambda bad_record: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[str]:
    """The texts of all good records of the files, in order.

    `report` is called with `file:line: reason` of each bad one, `advance` with the bytes just read.
    """
    for path in paths:
        with TextFile(path, documents) as file:
            done = 0
            for record in file.records():
                advance(file.num_bytes - done)
                done = file.num_bytes
                try:
                    yield from file.texts(record, json_key)
                except BadRecord as reason:
                    report(f"{path}:{record.line}: {reason}")


def total_size(paths: Sequence[Path]) -> int:
    """Bytes of the files as they are on disk; CorpusError when they are all empty."""
    size = sum(path.stat().st_size for path in paths)
    if not size:
        raise CorpusError(f"the input is empty: {', '.join(map(str, paths[:3]))}")
    return size
