"""Questions to a pretrained model: sentences of a text with one word, or piece of a script without spaces, hidden."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deberta_xl.data.tokenizer import MASK_PIECE, Tokenizer

SENTENCE_END = re.compile(r"(?<=[.!?。！？؟।።])\s*|\s*\n\s*")
JOINERS = dict.fromkeys(map(ord, "\u061c\u200b\u200c\u200d\u200e\u200f"))
"""What Persian, Thai, Hindi and Hebrew text has between its letters without being seen."""
COLUMNS = range(16, 66)
"""Width of a sentence that can be read in a table."""
WINDOW = 48
"""Columns of a piece of text without sentences, such as DNA."""


class Question(NamedTuple):
    """A sentence with a mask, and what is hidden behind it."""

    text: str
    hidden: str


def questions(texts: Iterable[str], tokenizer: Tokenizer, at_most: int) -> list[Question]:
    """One question from each of the first texts that have a fit sentence."""
    found: list[Question] = []
    for text in texts:
        asked = (ask(sentence, tokenizer) for sentence in sentences(text))
        if question := next(filter(None, asked), None):
            found.append(question)
        if len(found) == at_most:
            break
    return found


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text that fit into a table; of a text without any, its beginning."""
    fit = [s.strip() for s in SENTENCE_END.split(text) if columns(s.strip()) in COLUMNS]
    yield from fit
    if not fit:
        piece = " ".join(text[: 4 * WINDOW].split())
        while columns(piece) > WINDOW:
            piece = piece[: max(piece.rfind(" ", WINDOW // 3), 0) or len(piece) - 1]
        yield piece


def columns(text: str) -> int:
    """Columns of a terminal that a text takes: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def ask(sentence: str, tokenizer: Tokenizer) -> Question | None:
    """The sentence with the token nearest to its middle hidden that is a word; where words are several tokens, or have
    no ends, any piece of letters. None when there is no such token, or the sentence is no good for a command line."""
    if MASK_PIECE in sentence or sentence.startswith("-") or not sentence.translate(JOINERS).isprintable():
        return None
    ids, places = tokenizer.encode_with_places(sentence)
    inside = [
        (abs(int(begin + end) - len(sentence)), int(begin), int(end))
        for token, (begin, end) in zip(ids, places, strict=True)
        if token != tokenizer.unk_id and 0 < begin < end < len(sentence) and sentence[begin:end].isalpha()
    ]
    words = [place for place in inside if is_word(sentence, *place[1:])]
    if not inside:
        return None
    _, begin, end = min(words or inside)
    return Question(f"{sentence[:begin]}{MASK_PIECE}{sentence[end:]}", sentence[begin:end])


def is_word(sentence: str, begin: int, end: int) -> bool:
    """Whether a stretch of a sentence is a whole word between spaces and punctuation."""
    return sentence[begin - 1].isspace() and not sentence[end].isalnum() and end - begin > 1
