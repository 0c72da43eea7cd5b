"""Words and bytes of tokens are those of the text that they were made from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_dataset import documents

from deberta_xl.data.text_size import TextMeasure, TextSize
from deberta_xl.data.tokenizer import Tokenizer


def text_size(ids: np.ndarray, tokenizer: Tokenizer) -> TextSize:
    """Of one stretch."""
    return TextMeasure(tokenizer).size(ids, np.arange(len(ids)) == 0)


TEXTS = ["a", "The list type", "Grüße an x²", "日本 語"]


def joined(tokenizer, texts: list[str]) -> np.ndarray:
    """Their tokens, each text closed by [SEP]."""
    return np.concatenate([np.append(tokenizer.encode(text), tokenizer.sep_id) for text in texts]).astype(np.int64)


def test_words_and_bytes_are_those_of_the_text(small_dataset):
    known = small_dataset.tokenizer
    texts = [text for text in documents()[:80] if known.unk_id not in known.encode(text)]
    assert len(texts) > 20
    found = text_size(joined(small_dataset.tokenizer, texts), small_dataset.tokenizer)
    # A line each: what closes it counts for the space that the tokenizer puts before the first word.
    expected = TextSize(sum(len(t.split()) for t in texts), sum(len(t.encode()) + 1 for t in texts), 0)
    assert found == expected


def test_what_has_no_text_is_told(small_dataset):
    tokenizer = small_dataset.tokenizer
    ids = joined(tokenizer, TEXTS)
    found = text_size(ids, tokenizer)
    assert found.unknown == (ids == tokenizer.unk_id).sum() > 0
    assert found.words == sum(len(text.split()) for text in TEXTS)
    known = text_size(joined(tokenizer, TEXTS[:2]), tokenizer)
    assert (known.words, known.bytes) == (4, 2 + 14)


@pytest.mark.parametrize("ids", [[], [2, 2], [1, 2, 0]])
def test_specials_have_no_text(small_dataset, ids):
    assert text_size(np.array(ids, np.int64), small_dataset.tokenizer) == (0, 0, 0)


def test_a_text_in_parts_has_the_size_of_the_whole(small_dataset):
    ids = joined(small_dataset.tokenizer, documents()[:6])
    measure = TextMeasure(small_dataset.tokenizer)
    begins_document = np.append(0, np.flatnonzero(ids == small_dataset.tokenizer.sep_id) + 1)
    is_first = np.isin(np.arange(len(ids)), begins_document) | (np.arange(len(ids)) % 7 == 0)
    assert measure.size(ids, is_first) == text_size(ids, small_dataset.tokenizer)
    cuts = [0, *range(7, len(ids), 7), len(ids)]
    parts = [measure.size(ids[a:b], is_first[a:b]) for a, b in itertools.pairwise(cuts)]
    assert tuple(map(sum, zip(*parts, strict=True))) == text_size(ids, small_dataset.tokenizer)
