"""Masked language modelling: which tokens of a batch are predicted, and what is shown in their place.

Whole words in n-grams (SpanBERT's idea), as the original release chooses them (microsoft/DeBERTa: NGramMaskGenerator
in DeBERTa/apps/tasks/mlm_task.py), vectorised over the batch.
Two styles share one walk over the row's words:

1. A word is a run of tokens up to the next word start; specials and padding belong to no word.
2. Walk over the words: draw n ∈ {1 … max_ngram} with p ~ 1/n, mark n words at a uniform place in a window of
   n·k words, go on behind the window. k is the window's share per word.
3. Label marked words up to the row's quota, p times its tokens.
4. Show each labelled token as [MASK], as a random token, or as it is (80-10-10).

`original`: k = ⌊1/p⌋, the walk starts at the row's first word, and step 3 goes left to right until the quota, rounded,
is met. About one in six of the words are marked for p = 0.15, so that happens before the end of the row: of the last
tenth of 128 tokens 10 % are labelled, of 512 tokens 6 %, with max_ngram 1 none to 1 %. (Its further limit,
max_preds = ⌈S·p/10⌉·10, never binds: it is an integer and at least S·p.)

`unbiased`: words begin with every piece of a script without spaces, too (`data/words.py`), and a word of more than
LONGEST_WORD tokens (DNA, base64, code) is cut into parts of PART. The row is taken as a circle and the walk starts at a
random word: every rotation of the circle is equally likely, so every word has the same chance, wherever it stands.
k = ⌊0.8/p⌋ marks more than the quota. Step 3 lays the marked words, spans in random order, end to end around a second
circle, of M tokens, and labels those in an arc of it whose length is the quota, q. A word lies there with probability
q/M, whatever its length, so that the expected number of labels is q. Where M < q, all words of the row are laid out
instead, in random order. Where q ≥ 1 and no word lies in the arc (only in rows so short that a word is longer than q),
one of the row's shortest words is labelled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deberta_xl.data.random_numbers import derive, uniform
from deberta_xl.data.words import LONGEST_WORD, PART, begins_in_rows
from deberta_xl.settings.pretraining import DataSection

# Shapes: B rows, S tokens of a row, T maskable tokens of the batch, U words of the batch, W windows of a row,
# G max_ngram. Purposes of the random streams of a row:
LENGTHS, PLACES, ORDER, ROTATION, ARC, REPLACEMENT, WORD_ORDER, RESCUE = range(8)


class Words(NamedTuple):
    """The maskable words of a batch, row after row."""

    token_T: np.ndarray
    """Flat index (row · S + column) of each maskable token."""
    word_T: np.ndarray
    """The word to which each of them belongs."""
    length_U: np.ndarray
    """Tokens of each word."""
    row_U: np.ndarray
    """Row of each word."""
    count_B: np.ndarray
    """Words of each row."""
    first_B: np.ndarray
    """Number of each row's first word."""


def find_words(
    maskable_BS: np.ndarray, begins_BS: np.ndarray, segments_BS: np.ndarray, *, cuts_long_words: bool = False
) -> Words:
    """Cut the maskable tokens into words: a new one where `begins_BS` says so, and at every document's first token."""
    batch_size, length = maskable_BS.shape
    token_T = np.flatnonzero(maskable_BS)
    document_T = token_T // length * (length + 1) + segments_BS.reshape(-1)[token_T]
    begins_T = begins_BS.reshape(-1)[token_T] | (np.diff(document_T, prepend=-1) != 0)
    first_U = np.flatnonzero(begins_T)
    length_U = np.diff(first_U, append=token_T.size)
    if cuts_long_words and np.any(is_long_U := length_U > LONGEST_WORD):
        begins_T[starts_of_parts(first_U[is_long_U], length_U[is_long_U])] = True
        first_U = np.flatnonzero(begins_T)
        length_U = np.diff(first_U, append=token_T.size)
    row_U = token_T[first_U] // length
    count_B = np.bincount(row_U, minlength=batch_size)
    return Words(
        token_T=token_T,
        word_T=np.repeat(np.arange(first_U.size), length_U),
        length_U=length_U,
        row_U=row_U,
        count_B=count_B,
        first_B=np.cumsum(count_B) - count_B,
    )


def starts_of_parts(first_X: np.ndarray, length_X: np.ndarray) -> np.ndarray:
    """Where the parts begin of words from `first_X` on that are too long to be masked as a whole."""
    parts_X = -(-length_X // PART)
    number = np.arange(parts_X.sum()) - np.repeat(np.cumsum(parts_X) - parts_X, parts_X)
    return np.repeat(first_X, parts_X) + PART * number


class Masker:
    """Chooses and hides the tokens to predict, by the rules of `DataSection`.

    `word_starts` and `special` are `[vocab_size]` (`Tokenizer` has them): ids that begin a word, bool, or the flags of
    `data/words.py`; ids that are never predicted, bool. Spare ids count as special. `mask_id` is [MASK], the id right
    after the pieces.
    """

    def __init__(self, rule: DataSection, *, word_starts: np.ndarray, special: np.ndarray, mask_id: int):
        self.rule = rule
        self.mask_id = mask_id
        self.special = special
        self.is_unbiased = rule.masking == "unbiased"
        # The original masks single tokens, not words, when max_ngram is 1.
        masks_words = self.is_unbiased or rule.max_ngram > 1
        self.word_starts = word_starts if masks_words else np.ones(len(word_starts), bool)
        self.window = max(1, int((0.8 if self.is_unbiased else 1.0) / rule.mask_probability + 1e-9))
        self.replacements = np.flatnonzero(~special) if self.is_unbiased else np.arange(mask_id + 1)
        weights = 1.0 / np.arange(1, rule.max_ngram + 1)
        self.ngram_thresholds = np.cumsum(weights / weights.sum())[:-1]

    def mask(self, input_ids: np.ndarray, segments: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masked copy of `input_ids` and the labels, int64 `[B, S]` each; label 0 = not predicted.

        `segments` `[B, S]`: 0 = padding, n = n-th document of the row. `keys` uint64 `[B]`, `derive(seed, epoch, row)`:
        a row's mask depends on its key and tokens only, not on the batch it is in.
        """
        maskable_BS = (segments > 0) & ~self.special[input_ids]
        begins_BS = begins_in_rows(self.word_starts[input_ids])
        words = find_words(maskable_BS, begins_BS, segments, cuts_long_words=self.is_unbiased)
        masked, labels = input_ids.copy(), np.zeros_like(input_ids)
        if words.token_T.size:
            labelled = self.labelled_tokens(words, np.count_nonzero(segments, axis=1), keys)
            chosen = input_ids.reshape(-1)[labelled]
            labels.reshape(-1)[labelled] = chosen
            masked.reshape(-1)[labelled] = self.shown(chosen, *np.divmod(labelled, input_ids.shape[1]), keys)
        return masked, labels

    def labelled_tokens(self, words: Words, tokens_B: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Flat indices of the tokens to predict (steps 2 and 3); `tokens_B`: tokens of each row, specials included."""
        start_BW, count_BW = self.spans(words.count_B, keys)
        if self.is_unbiased:
            order = np.argsort(uniform(derive(keys, ORDER)[:, None], np.arange(start_BW.shape[1])), axis=1)
            start_BW, count_BW = (np.take_along_axis(a, order, axis=1) for a in (start_BW, count_BW))
            rotation = uniform(derive(keys, ROTATION), np.zeros(1)) * words.count_B
            start_BW = start_BW + rotation.astype(np.int64)[:, None]
        place_BWG = start_BW[..., None] + np.arange(self.rule.max_ngram)
        is_marked = (np.arange(self.rule.max_ngram) < count_BW[..., None]).reshape(len(keys), -1)
        word = words.first_B[:, None] + place_BWG.reshape(len(keys), -1) % np.maximum(words.count_B, 1)[:, None]
        length = words.length_U[np.minimum(word, words.length_U.size - 1)] * is_marked
        begin_BW = np.cumsum(length, axis=1) - length
        quota_B = self.quota(tokens_B)
        is_labelled_U = np.zeros(words.length_U.size, bool)
        if not self.is_unbiased:
            is_labelled_U[word[is_marked & (begin_BW < quota_B[:, None])]] = True
            return words.token_T[is_labelled_U[words.word_T]]
        total_B = begin_BW[:, -1] + length[:, -1]
        draws_B2 = uniform(derive(keys, ARC)[:, None], np.arange(2))
        in_arc = lies_in_arc(begin_BW, length, total_B[:, None], quota_B[:, None], draws_B2[:, None])
        is_labelled_U[word[is_marked & in_arc]] = True
        if np.any(lacks_B := (total_B < quota_B) & (words.count_B > 0)):
            self.label_of_all_words(is_labelled_U, words, lacks_B, quota_B, keys)
        has_label_B = np.bincount(words.row_U[is_labelled_U], minlength=len(keys)) > 0
        for row in np.flatnonzero(~has_label_B & (quota_B >= 1) & (words.count_B > 0)):
            is_labelled_U[self.shortest_word(words, row, keys[row])] = True
        return words.token_T[is_labelled_U[words.word_T]]

    def label_of_all_words(
        self, is_labelled_U: np.ndarray, words: Words, rows_B: np.ndarray, quota_B: np.ndarray, keys: np.ndarray
    ) -> None:
        """Step 3 for the rows `rows_B` (bool), in which too little is marked: over all their words, in random order."""
        word_V = np.flatnonzero(rows_B[words.row_U])
        row_V = words.row_U[word_V]
        word_V = word_V[np.lexsort((uniform(derive(keys, WORD_ORDER)[row_V], word_V - words.first_B[row_V]), row_V))]
        length_V = words.length_U[word_V]
        begin_V = np.cumsum(length_V) - length_V
        total_B = np.bincount(row_V, weights=length_V, minlength=len(keys)).astype(np.int64)
        begin_V -= (np.cumsum(total_B) - total_B)[row_V]
        draws_V2 = uniform(derive(keys, ARC)[:, None], np.arange(2))[row_V]
        is_labelled_U[word_V] = lies_in_arc(begin_V, length_V, total_B[row_V], quota_B[row_V], draws_V2)

    def shortest_word(self, words: Words, row: int, key: np.uint64) -> int:
        """One of a row's shortest words."""
        first = words.first_B[row]
        length = words.length_U[first : first + words.count_B[row]]
        shortest = np.flatnonzero(length == length.min())
        draw = uniform(derive(key, RESCUE), np.zeros(1))[0]
        return int(first + shortest[int(draw * shortest.size)])

    def spans(self, words_B: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First word and number of words of each row's spans, int64 `[B, W]` each; unused ones have no words.

        A window behind which no words are left does not influence what follows, so the walk is a running sum.
        """
        windows = np.arange(-(-int(words_B.max()) // self.window))
        draws = uniform(derive(keys, LENGTHS)[:, None], windows)
        count_BW = 1 + np.searchsorted(self.ngram_thresholds, draws, side="right")
        width_BW = self.window * count_BW
        draws = uniform(derive(keys, PLACES)[:, None], windows)
        advance_BW = np.maximum(width_BW, (draws * width_BW).astype(np.int64) + count_BW)
        offset_BW = np.cumsum(advance_BW, axis=1) - advance_BW
        left_BW = np.maximum(words_B[:, None] - offset_BW, 0)
        start_BW = offset_BW + (draws * np.minimum(width_BW, left_BW)).astype(np.int64)
        return start_BW, np.clip(words_B[:, None] - start_BW, 0, count_BW)

    def quota(self, tokens_B: np.ndarray) -> np.ndarray:
        """Tokens to label in each row of `tokens_B` tokens: a mean, or the number at which the original is done."""
        expected_B = self.rule.mask_probability * tokens_B
        return expected_B if self.is_unbiased else np.maximum(1, np.rint(expected_B).astype(np.int64))

    def shown(self, chosen: np.ndarray, rows: np.ndarray, columns: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """What stands in place of the `chosen` ids (step 4).

        One draw decides both: given that it falls between the two thresholds it is uniform there, and picks the token.
        """
        draws = uniform(derive(keys, REPLACEMENT)[rows], columns)
        beyond = draws - self.rule.replace_with_mask
        is_random = (beyond >= 0) & (beyond < self.rule.replace_with_random)
        shown = np.where(beyond < 0, self.mask_id, chosen)
        if np.any(is_random):
            pick = (beyond[is_random] / self.rule.replace_with_random * self.replacements.size).astype(np.int64)
            shown[is_random] = self.replacements[np.minimum(pick, self.replacements.size - 1)]
        return shown


def lies_in_arc(
    begin: np.ndarray, length: np.ndarray, total: np.ndarray, arc: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Whether words that begin at `begin` on a circle of `total` tokens lie on an arc of it at a random place.

    A word does when a point of it does, which is at the same share of every word of the row: the words at the two ends
    of the arc are then seldom both in or both out. `draws` `[…, 2]`: the arc's place and the share.
    """
    place = draws[..., 1] * length
    place += begin - draws[..., 0] * total  # −total … total: once around at most
    return (place >= 0) & (place < arc) | (place < arc - total)
