"""Which characters a text has, how often, and which of them a tokenizer does not know."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from deberta_xl.data.tokenizer import Tokenizer

NUM_CODE_POINTS = 0x110000
COUNTED_AT_ONCE = 2**20
"""Characters."""


class CharacterCounts:
    """Counts the characters of texts that pass by, letters with their marks where `composes` (normal form C)."""

    def __init__(self, *, composes: bool) -> None:
        self.composes = composes
        self.counts = np.zeros(NUM_CODE_POINTS, np.int64)
        self.waiting: list[str] = []
        self.num_waiting = 0

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts."""
        for text in texts:
            self.waiting.append(text)
            self.num_waiting += len(text)
            if self.num_waiting >= COUNTED_AT_ONCE:
                self.count()
            yield text
        self.count()

    def count(self) -> None:
        """Count the texts that wait."""
        text = "\n".join(self.waiting)
        text = unicodedata.normalize("NFC", text) if self.composes else text
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.counts += np.bincount(code_points, minlength=NUM_CODE_POINTS)
        self.waiting, self.num_waiting = [], 0

    @property
    def total(self) -> int:
        """Characters, white space aside."""
        return sum(self.found().values())

    def found(self) -> dict[str, int]:
        """Character → count, most frequent first; white space aside."""
        numbers = np.flatnonzero(self.counts)
        order = np.argsort(-self.counts[numbers], kind="stable")
        pairs = ((chr(number), int(self.counts[number])) for number in numbers[order])
        return {character: count for character, count in pairs if not character.isspace()}


def unknown_to(tokenizer: Tokenizer, characters: Iterable[str]) -> Iterator[str]:
    """Those of the characters that become [UNK]."""
    characters = list(characters)
    for character, ids in zip(characters, tokenizer.encode_batch(characters), strict=True):
        if tokenizer.unk_id in ids:
            yield character


class UnknownCharacters:
    """Counts the characters of texts that a tokenizer does not know; each is looked up once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.is_unknown: dict[str, bool] = {}

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """Character → count, of texts in which there are some."""
        found: Counter[str] = Counter()
        for text in texts:
            text = unicodedata.normalize("NFC", text)
            characters = set(text)
            if new := characters - self.is_unknown.keys():
                self.is_unknown |= dict.fromkeys(new, False)
                self.is_unknown |= dict.fromkeys(unknown_to(self.tokenizer, new), True)
            found.update({c: text.count(c) for c in characters if self.is_unknown[c]})
        return found


def shown(character: str) -> str:
    """A character for a list: itself, or its code point and name where it cannot be seen on its own."""
    if unicodedata.category(character)[0] in "LNPS":
        return character
    name = unicodedata.name(character, "").lower()
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")


def listed(counts: dict[str, int], at_most: int) -> str:
    """The first of some characters with their counts, in words."""
    first = [f"{shown(character)} ×{count:,}" for character, count in list(counts.items())[:at_most]]
    more = f" and {len(counts) - at_most:,} more" if len(counts) > at_most else ""
    return ", ".join(first) + more
