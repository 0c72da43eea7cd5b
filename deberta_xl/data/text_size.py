"""How much text tokens stand for, in words and bytes: by those, losses of different tokenizers can be compared."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deberta_xl.data.tokenizer import Tokenizer


class TextSize(NamedTuple):
    """Of a stretch of text."""

    words: int
    """Runs of characters between spaces. Scripts without spaces have clauses there: compare them by bytes."""
    bytes: int
    """In UTF-8, as the tokenizer normalises the text, each document on a line of its own."""
    unknown: int
    """[UNK]: tokens whose text is not known, and is left out of both."""


class TextMeasure:
    """What each id of a tokenizer adds to a text."""

    def __init__(self, tokenizer: Tokenizer):
        size = tokenizer.vocab_size
        self.unk_id = tokenizer.unk_id
        self.bytes_V, self.more_words_V = np.zeros((2, size), np.int64)
        self.begins_V = np.zeros(size, bool)
        """Begins with a space, and so a word."""
        self.is_blank_V = tokenizer.special.copy()
        """Nothing but space, or the border of a document: what follows begins a word."""
        self.is_blank_V[tokenizer.unk_id] = False
        for number in np.flatnonzero(~tokenizer.special).tolist():
            text = tokenizer.surface(number)
            is_byte = number < tokenizer.num_pieces and tokenizer.processor.is_byte(number)
            self.bytes_V[number] = 1 if is_byte else len(text.encode())
            self.begins_V[number] = text[:1].isspace()
            self.is_blank_V[number] = text.isspace()
            self.more_words_V[number] = max(0, len(text.split()) - 1)

    def size(self, ids_L: np.ndarray, is_first_L: np.ndarray) -> TextSize:
        """Of ids in the order of the text. `is_first_L` marks those whose predecessor is elsewhere: their word has been
        counted there, where a lone space announces it, so that the parts of a text add up."""
        is_blank_L, is_space_L = self.is_blank_V[ids_L], self.begins_V[ids_L] & self.is_blank_V[ids_L]
        follows_blank_L = np.roll(is_blank_L, 1) & ~is_first_L
        announces_L = is_space_L & np.roll(is_first_L, -1)
        begins_L = (~is_blank_L & (self.begins_V[ids_L] | follows_blank_L)) | announces_L
        words = begins_L.sum() + self.more_words_V[ids_L].sum()
        return TextSize(int(words), int(self.bytes_V[ids_L].sum()), int((ids_L == self.unk_id).sum()))
