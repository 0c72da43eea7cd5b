"""Looking at a text before anything is made of it: how it is divided, which characters it has, what can be held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deberta_xl.base.errors import CorpusError, counted
from deberta_xl.corpus.characters import CharacterCounts
from deberta_xl.corpus.documents import is_held_out
from deberta_xl.corpus.reading import TextFile, iterate_documents
from deberta_xl.corpus.tokenizer_rules import ALPHABET_CHARACTERS

LOOKED_AT = 20_000_000
"""Characters of a text that are looked at."""
LEAST_CHARACTERS = 20_000
"""Of less text not even a small model learns anything."""
ENOUGH_DOCUMENTS = 40
LONG_LINE = 200
"""Mean characters of a line from which on lines are documents rather than sentences or verses."""
SHARES = (0.05, 0.1, 0.2, 0.3)
"""Shares that may be held out; the first that gives enough is taken."""
HELD_OUT_CHARACTERS = 1000


class TextForm(NamedTuple):
    """What a text is like."""

    documents: str
    """How to divide it, one of DOCUMENTS."""
    num_documents: int
    """Documents that were looked at."""
    num_characters: int
    """Characters that were looked at."""
    different_characters: int
    valid_share: float
    """Share of the documents to hold out."""

    def vocab_size(self, usual: int) -> int:
        """Rows of a word table with room for words beside the characters; `usual` for an alphabet."""
        return max(usual, -(-2 * self.different_characters // 1000) * 1000)

    @property
    def needs_bytes(self) -> bool:
        """Whether there are so many characters that the rarest should be spelt in bytes."""
        return self.different_characters > ALPHABET_CHARACTERS

    def __str__(self) -> str:
        division = {
            "blank_lines": "between blank lines",
            "lines": "a line each",
            "files": "a file each",
            "parts": "cut from longer ones",
        }[self.documents]
        return (
            f"{counted(self.num_documents, 'document')} ({division}), {self.num_characters:,} characters, "
            f"{self.different_characters:,} different ones"
        )


def look_at(paths: Sequence[Path], json_key: str = "text") -> TextForm:
    """The form of a text. Raises CorpusError for one that is too short, or that cannot be read."""
    documents = choose_division(*lengths(paths, json_key))
    counts, held_out, bad = CharacterCounts(composes=True), dict.fromkeys(SHARES, 0), []
    number, characters = 0, 0
    texts = iterate_documents(paths, json_key, documents, report=bad.append)
    for text in counts.watch(first_of(texts)):
        number, characters = number + 1, characters + len(text)
        for share in SHARES:
            held_out[share] += len(text) if is_held_out(text, share) else 0
    if not number:
        raise CorpusError(
            f"no text can be read: {bad[0] if bad else 'there is none'}; files are to be UTF-8 (others: iconv -f "
            "ISO-8859-1 -t UTF-8 FILE > NEW)"
        )
    if characters < LEAST_CHARACTERS:
        raise CorpusError(
            f"the text has {counted(characters, 'character')}; the least from which something can be learnt is "
            f"{LEAST_CHARACTERS:,}, some ten pages: give more text"
        )
    share = next((share for share in SHARES if HELD_OUT_CHARACTERS <= held_out[share] < characters), None)
    if share is None:
        raise CorpusError(f"{counted(number, 'document')} are too few to hold some out; give more, or longer, texts")
    return TextForm(documents, number, characters, len(counts.found()), share)


def first_of(texts: Iterable[str]) -> Iterator[str]:
    """Texts up to LOOKED_AT characters."""
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= LOOKED_AT:
            return


def lengths(paths: Sequence[Path], json_key: str) -> tuple[list[int], list[int]]:
    """Characters of each document between blank lines (or record), and of each line in them.

    A line too long to be read as one counts for half of what is looked at.
    """
    blocks: list[int] = []
    lines: list[int] = []
    seen = 0
    for path in paths:
        with TextFile(path) as file:
            for record in file.records():
                text = "x" * (LOOKED_AT // 2) if record.data is None else record.data.decode(errors="replace")
                blocks.append(len(text))
                lines += map(len, text.split("\n")) if file.kind == ".txt" else [len(text)]
                seen += len(text)
                if seen >= LOOKED_AT:
                    return blocks, lines
    return blocks, lines


def choose_division(blocks: Sequence[int], lines: Sequence[int]) -> str:
    """How to divide a text with blocks and lines of these lengths into documents, some of which can be held out."""
    for division, sizes, least in (("blank_lines", blocks, 0), ("lines", lines, LONG_LINE)):
        enough = len(sizes) >= ENOUGH_DOCUMENTS and max(sizes) * 10 <= sum(sizes)
        if enough and sum(sizes) >= least * len(sizes):
            return division
    return "parts"
