"""Texts of different lengths in batches that hold little padding: similar lengths together, as many as a number of
tokens allows."""

from __future__ import annotations

import numpy as np

MICRO_BATCH_TOKENS = 4096
"""Tokens in one forward, unless somebody asks for another number."""
MOST_PADDING = 0.25
"""Share of a row that may be padding. However many the texts, some twenty batches end for this, and not for tokens."""


def length_batches(lengths: np.ndarray, most_tokens: int, *, rows_each: int = 1) -> list[np.ndarray]:
    """The numbers of the texts in each batch; the longest texts come first, so that memory that fails does so at once.

    A batch takes at most `most_tokens`, padding counted, but for a text that has more alone. Each text has `rows_each`
    rows of at most its length.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        end = start + max(1, most_tokens // (longest * rows_each))
        # Lengths fall: those that are similar are the next ones.
        similar = np.count_nonzero(lengths[order[start:end]] >= (1 - MOST_PADDING) * longest)
        batches.append(order[start : start + similar])
        start += similar
    return batches
