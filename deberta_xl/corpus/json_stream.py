"""Files of JSON that are not a line an object: a list, or objects over several lines, read in bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from json.decoder import WHITESPACE
from typing import Any, BinaryIO, NamedTuple

CHUNK = 2**20
SPREAD = re.compile(rb"\s*(\[\s*\{|\[\s*[\r\n]|\{\s*[\r\n]|\{[^\r\n]*[,{\[][ \t]*[\r\n])")


class Value(NamedTuple):
    """One value of a file."""

    line: int
    """Number of its first line, from 1."""
    text: str
    value: Any


def is_spread(start: bytes) -> bool:
    """Whether a file that begins so is a list, or objects over several lines, not an object a line."""
    return SPREAD.match(start.removeprefix(codecs.BOM_UTF8)) is not None


def values_of(file: BinaryIO, *, max_characters: int) -> Iterator[Value]:
    """The values of a list, or those that follow each other, whatever lines they take.

    Raises ValueError naming the line where the file is no JSON or not UTF-8, or a value is longer than allowed.
    """
    reader = Reader(file, max_characters)
    if not reader.takes("["):
        while reader.next_character():
            yield reader.value()
        return
    if not reader.takes("]"):
        yield reader.value()
        while reader.takes(","):
            yield reader.value()
        if not reader.takes("]"):
            raise ValueError(f"line {reader.line}: not valid JSON: a comma or the end of the list is expected")
    if reader.next_character():
        raise ValueError(f"line {reader.line}: not valid JSON: something follows the list")


class Reader:
    """A place in a text that is read as it is needed."""

    def __init__(self, file: BinaryIO, max_characters: int):
        self.file, self.max_characters = file, max_characters
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.place, self.line = "", 0, 1
        self.is_whole = False

    def read(self) -> bool:
        """Read on; whether there was more."""
        if self.is_whole:
            return False
        data = self.file.read(CHUNK)
        self.is_whole = not data
        try:
            text = self.decoder.decode(data, final=self.is_whole)
        except UnicodeDecodeError as error:
            line = self.line + self.buffer.count("\n", self.place)
            raise ValueError(f"near line {line}: not UTF-8 ({error.reason})") from None
        self.buffer = self.buffer[self.place :] + text
        self.place = 0
        return not self.is_whole or bool(text)

    def next_character(self) -> str:
        """The next character that is no blank, whose place this becomes; "" at the end."""
        while True:
            end = WHITESPACE.match(self.buffer, self.place).end()
            self.move(end)
            if end < len(self.buffer):
                return self.buffer[end]
            if not self.read():
                return ""

    def move(self, end: int) -> None:
        """Go on to a place."""
        self.line += self.buffer.count("\n", self.place, end)
        self.place = end

    def takes(self, character: str) -> bool:
        """Go past a character, if it is the next one."""
        if self.next_character() != character:
            return False
        self.place += 1
        return True

    def value(self) -> Value:
        """The value that comes next."""
        self.next_character()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.buffer, self.place)
                break
            except json.JSONDecodeError as error:
                known = len(self.buffer) - self.place
                if known > self.max_characters:
                    raise ValueError(f"line {self.line}: more than {self.max_characters:,} characters") from None
                while len(self.buffer) - self.place < 2 * known and self.read():
                    pass  # doubled, since the value is read from its beginning again
                if len(self.buffer) - self.place == known:
                    raise ValueError(f"line {self.line}: not valid JSON: {error.msg}") from None
            except RecursionError:
                raise ValueError(f"line {self.line}: not valid JSON: nested too deeply") from None
        text = self.buffer[self.place : end]
        found = Value(self.line, text, value)
        self.move(end)
        return found
