"""Where words begin, for whole-word masking: at spaces, at punctuation, and at pieces of scripts that use no spaces.

The original knows only the first two. In Japanese, Chinese, Thai its "words" are whole clauses, so `unbiased` masking
lets every piece of such a script begin a word, and what follows one, too: the Latin name in a Chinese sentence. What
belongs to the character before it begins nothing: a vowel sign, the later bytes of a character written in bytes.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import NamedTuple

import numpy as np
from fontTools.unicodedata import script_extension

WORD_MARK = "\u2581"

LONGEST_WORD = 8
"""Tokens of a word that is masked as a whole; English words have fewer, even with a small vocabulary."""
PART = 3
"""Tokens of the parts into which longer ones are cut: what words that are not in the vocabulary usually have."""

BEGINS, JOINS, ENDS = 1, 2, 4
"""Flags of a piece: begins a word; never begins one; whatever follows it begins one, unless that joins."""

WITHOUT_SPACES = frozenset(
    {"Hani", "Hira", "Kana", "Bopo", "Yiii", "Nshu", "Tang", "Jurc", "Seal"}  # lines break anywhere: Line_Break ID, CJ
    | {"Thai", "Laoo", "Khmr", "Mymr", "Lana", "Tale", "Talu", "Tavt", "Ahom"}  # where a dictionary says: SA
    | {"Bali", "Batk", "Brah", "Cham", "Diak", "Gran", "Gukh", "Java", "Kawi", "Maka", "Tutg"}  # at syllables: AK, AS
    | {"Tibt", "Kits", "Egyp", "Hluw", "Xsux"}  # other lines, no spaces between words
)
"""Unicode's codes of the scripts that are written without spaces between words."""
EAST_ASIAN_LEADS = range(0xE3, 0xEA)
"""In UTF-8, characters whose first byte is one of these are U+3000 … U+9FFF: kana, Han and their punctuation."""


def begins_word(piece: str) -> bool:
    """The original's rule: the piece carries the word mark, or is a lone space, control or punctuation character.

    ASCII symbols such as `$` and `^` count as punctuation, as they did in BERT and the first release.
    """
    if piece.startswith(WORD_MARK):
        return True
    if len(piece) != 1:
        return False
    is_ascii_symbol = piece.isascii() and not piece.isalnum()
    return is_ascii_symbol or unicodedata.category(piece)[0] in "PC" or unicodedata.category(piece) == "Zs"


@functools.cache
def lacks_spaces(character: str) -> bool:
    """Whether a character is of a script without spaces, or of the signs that such scripts share (ー 々 、 ㍿).

    A sign that Latin uses, too, is not: the middle dot of Catalan is that of Chinese names.
    """
    scripts = script_extension(character)
    return not WITHOUT_SPACES.isdisjoint(scripts) and "Latn" not in scripts


@functools.cache
def joins_before(character: str) -> bool:
    """Whether a character is part of the one before it: a combining mark or vowel sign, a joiner, a selector."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me") or character in "\u200c\u200d"


def word_flags(piece: str, byte: int | None = None) -> int:
    """BEGINS, JOINS and ENDS of a piece; `byte` is what it stands for where the tokenizer falls back to bytes."""
    if byte is not None:
        return flags_of_byte(byte)
    flags = BEGINS if begins_word(piece) else 0
    if piece.removeprefix(WORD_MARK).isascii():
        return flags
    if joins_before(piece[0]):
        flags |= JOINS
    elif lacks_spaces(piece[0]):
        flags |= BEGINS
    while len(piece) > 1 and joins_before(piece[-1]):
        piece = piece[:-1]
    return flags | (ENDS if lacks_spaces(piece[-1]) else 0)


def flags_of_byte(byte: int) -> int:
    """The flags of a byte of UTF-8; the script of a character is seen in its first byte only where that leaves one."""
    if byte < 0x80:
        return BEGINS if begins_word(chr(byte)) else 0
    if byte < 0xC0:
        return JOINS
    return BEGINS if byte in EAST_ASIAN_LEADS else 0


def begins_in_rows(flags_BS: np.ndarray) -> np.ndarray:
    """Which tokens of rows begin a word, bool `[B, S]`, from the flags of each (bool: only BEGINS is known)."""
    if flags_BS.dtype == bool:
        return flags_BS
    begins_BS = flags_BS & BEGINS > 0
    begins_BS[:, 1:] |= (flags_BS[:, :-1] & ENDS > 0) & (flags_BS[:, 1:] & JOINS == 0)
    return begins_BS


class WordLengths(NamedTuple):
    """How long the words of some text are, in tokens."""

    num_words: int = 0
    num_tokens: int = 0
    longest: int = 0
    in_long_words: int = 0
    """Tokens in words of more than LONGEST_WORD."""

    def plus(self, other: WordLengths) -> WordLengths:
        """Of both texts."""
        words, tokens, longest, in_long_words = other
        return WordLengths(
            self.num_words + words,
            self.num_tokens + tokens,
            max(self.longest, longest),
            self.in_long_words + in_long_words,
        )


def word_lengths(flags_T: np.ndarray, document_lengths: np.ndarray) -> WordLengths:
    """Of documents whose pieces' flags stand back to back."""
    begins_T = begins_in_rows(flags_T[None])[0]
    begins_T[np.cumsum(document_lengths) - document_lengths] = True
    length_U = np.diff(np.flatnonzero(begins_T), append=flags_T.size)
    in_long_words = length_U[length_U > LONGEST_WORD].sum()
    return WordLengths(length_U.size, flags_T.size, int(length_U.max(initial=0)), int(in_long_words))
