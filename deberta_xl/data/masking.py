"""Masked language modelling: which tokens of a batch are predicted, and what is shown in their place.

Whole words in n-grams (SpanBERT's idea), as the original release chooses them (microsoft/DeBERTa: NGramMaskGenerator
in DeBERTa/apps/tasks/mlm_task.py), vectorised over the batch.
Two styles share one walk over the row's words:

1. A word is a run of tokens up to the next word start; specials and padding belong to no word.
2. Walk over the words: draw n ∈ {1 … max_ngram} with p ~ 1/n, mark n words at a uniform place in a window of
   n·k words, go on behind the window. k is the window's share per word.
3. Label the marked words, one after the other, while fewer tokens are labelled than the row's quota.
4. Show each labelled token as [MASK], as a random token, or as it is (80-10-10).

`original`: k = ⌊1/p⌋, the walk starts at the row's first word, and step 3 goes left to right. About one in six of the
words are marked for p = 0.15, so the quota is met before the end of the row, whose last tokens are hardly ever masked.
(Its further limit, max_preds = ⌈S·p/10⌉·10, never binds: it is an integer not below S·p.)

`unbiased`: the row is taken as a circle and the walk starts at a random word; step 3 takes the spans in random order.
Every rotation of the circle is equally likely, so every word has the same chance, wherever it stands. k = ⌊0.8/p⌋
marks more than the quota, so that it is nearly always met; and since the last word overshoots the quota by
Σl²/(2Σl) − 1/2 tokens on average (l: the row's word lengths; the mean residual life of a renewal process), the quota is
lowered by that and rounded at random: the expected number of labels is p times the row's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deberta_xl.config import DataSection
from deberta_xl.data.random_numbers import derive, uniform

# Shapes: B rows, S tokens of a row, T maskable tokens of the batch, U words of the batch, W windows of a row,
# G max_ngram. Purposes of the random streams of a row:
LENGTHS, PLACES, ORDER, ROTATION, ROUNDING, REPLACEMENT = range(6)


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


def find_words(maskable_BS: np.ndarray, begins_BS: np.ndarray, segments_BS: np.ndarray) -> Words:
    """Cut the maskable tokens into words: a new one where `begins_BS` says so, and at every document's first token."""
    batch_size, length = maskable_BS.shape
    token_T = np.flatnonzero(maskable_BS)
    document_T = token_T // length * (length + 1) + segments_BS.reshape(-1)[token_T]
    begins_T = begins_BS.reshape(-1)[token_T] | (np.diff(document_T, prepend=-1) != 0)
    first_U = np.flatnonzero(begins_T)
    row_U = token_T[first_U] // length
    count_B = np.bincount(row_U, minlength=batch_size)
    return Words(
        token_T=token_T,
        word_T=np.cumsum(begins_T) - 1,
        length_U=np.diff(first_U, append=token_T.size),
        row_U=row_U,
        count_B=count_B,
        first_B=np.cumsum(count_B) - count_B,
    )


class Masker:
    """Chooses and hides the tokens to predict, by the rules of `DataSection`.

    `word_starts` and `special` are bool `[vocab_size]` (`Tokenizer` has them): ids that begin a word; ids that are
    never predicted. Spare ids count as special. `mask_id` is [MASK], the id right after the pieces.
    """

    def __init__(self, rule: DataSection, *, word_starts: np.ndarray, special: np.ndarray, mask_id: int):
        self.rule = rule
        self.mask_id = mask_id
        self.special = special
        self.is_unbiased = rule.masking == "unbiased"
        # The original masks single tokens, not words, when max_ngram is 1.
        masks_words = self.is_unbiased or rule.max_ngram > 1
        self.word_starts = word_starts if masks_words else np.ones_like(word_starts)
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
        words = find_words(maskable_BS, self.word_starts[input_ids], segments)
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
        labelled_before = np.cumsum(length, axis=1) - length
        is_labelled_U = np.zeros(words.length_U.size, bool)
        is_labelled_U[word[is_marked & (labelled_before < self.quota(words, tokens_B, keys)[:, None])]] = True
        return words.token_T[is_labelled_U[words.word_T]]

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

    def quota(self, words: Words, tokens_B: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Labelled tokens at which each row is done, int64 `[B]`."""
        expected = self.rule.mask_probability * tokens_B
        if not self.is_unbiased:
            return np.maximum(1, np.rint(expected).astype(np.int64))
        tokens, squares = (
            np.bincount(words.row_U, weights=words.length_U**power, minlength=len(tokens_B)) for power in (1, 2)
        )
        overshoot = squares / np.maximum(2 * tokens, 1) - 0.5
        rounding = uniform(derive(keys, ROUNDING), np.zeros(1))
        return np.floor(np.where(tokens > 0, expected - overshoot, 0) + rounding).astype(np.int64)

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
