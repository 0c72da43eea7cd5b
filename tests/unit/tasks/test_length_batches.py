"""Texts in batches: each once, lengths together, never more tokens than asked for."""

from __future__ import annotations

import numpy as np
import pytest

from deberta_xl.tasks.length_batches import MOST_PADDING, length_batches

LENGTHS = np.random.default_rng(1).lognormal(4, 0.8, 500).astype(int) + 2


@pytest.mark.parametrize("rows_each", [1, 3])
@pytest.mark.parametrize("most_tokens", [1, 100, 4096])
def test_each_text_is_in_one_batch_that_keeps_to_its_tokens_and_holds_little_padding(most_tokens, rows_each):
    batches = length_batches(LENGTHS, most_tokens, rows_each=rows_each)
    assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * rows_each * LENGTHS[batch].max() <= most_tokens
        assert LENGTHS[batch].min() >= (1 - MOST_PADDING) * LENGTHS[batch].max()


def test_the_longest_come_first_and_texts_that_are_equally_long_in_their_order():
    longest = [LENGTHS[batch].max() for batch in length_batches(LENGTHS, 512)]
    assert longest == sorted(longest, reverse=True)
    assert [batch.tolist() for batch in length_batches(np.full(5, 10), 20)] == [[0, 1], [2, 3], [4]]


def test_many_texts_are_read_in_hardly_more_forwards_than_their_tokens_take():
    lengths = np.tile(LENGTHS, 20)
    assert len(length_batches(lengths, 4096)) < 1.15 * lengths.sum() / 4096
    assert length_batches(lengths[:0], 4096) == []
