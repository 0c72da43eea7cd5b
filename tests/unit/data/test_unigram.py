"""The loss of guessing without context."""

import json
import math

import numpy as np
import pytest
from small_stores import make_documents, write

from deberta_xl.base.errors import TokenStoreError
from deberta_xl.data import unigram
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.unigram import cross_entropy, log_unigram, token_counts
from deberta_xl.settings.pretraining import DataSection

NOTHING_SPECIAL = np.zeros(4, bool)


def manifest_of(prefix):
    return prefix.with_suffix(".manifest.json")


def test_the_writer_counts_what_it_wrote(prefix):
    expected = np.bincount(np.concatenate(make_documents()), minlength=200)
    assert np.array_equal(TokenStore(prefix).token_counts, expected)
    assert np.array_equal(token_counts(TokenStore(prefix), 200), expected)
    assert token_counts(TokenStore(prefix), 210).tolist() == [*expected, *[0] * 10]


@pytest.mark.parametrize("counts", [None, "1 2 3", "", "x y", 7, "9" * 30])
def test_datasets_without_counts_of_their_own_are_counted(prefix, counts):
    expected = TokenStore(prefix).token_counts
    manifest = json.loads(manifest_of(prefix).read_text())
    del manifest["token_counts"]
    manifest_of(prefix).write_text(json.dumps(manifest | ({} if counts is None else {"token_counts": counts})))
    assert TokenStore(prefix).token_counts is None
    assert np.array_equal(token_counts(TokenStore(prefix), 200), expected)


def test_megatrons_datasets_are_counted_too_and_large_ones_in_parts(prefix, monkeypatch, caplog):
    expected = TokenStore(prefix).token_counts
    manifest_of(prefix).unlink()
    assert np.array_equal(token_counts(TokenStore(prefix), 200), expected)
    assert "no counts" not in caplog.text
    monkeypatch.setattr(unigram, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(unigram.logger, "propagate", True)
    with caplog.at_level("INFO"):
        counts = token_counts(TokenStore(prefix), 150)
    assert counts.sum() <= 64 * 4
    assert np.all(counts <= expected[:150])
    assert "the manifest holds no counts; the unigram is that of 256 tokens from all over it" in caplog.text


def test_the_unigram_is_the_share_of_each_id_among_those_that_can_be_labels():
    special = np.array([True, False, False, False])
    assert np.exp(log_unigram(np.array([90, 2, 5, 3]), special)).tolist() == pytest.approx([0, 0.2, 0.5, 0.3])


def test_unseen_ids_share_what_those_seen_once_have():
    probability = np.exp(log_unigram(np.array([0, 0, 1, 99, 400]), np.zeros(5, bool)))
    assert probability.tolist() == pytest.approx([0.001, 0.001, 0.002 * 0.998, 0.198 * 0.998, 0.8 * 0.998])
    assert np.exp(log_unigram(np.array([0, 2, 8]), np.zeros(3, bool))).tolist() == pytest.approx([0.1, 0.18, 0.72])
    for counts in ([0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 10**12]):
        assert np.exp(log_unigram(np.array(counts), NOTHING_SPECIAL)).sum() == pytest.approx(1)


def test_the_cross_entropy_of_few_labels_is_that_of_the_distribution_they_come_from():
    """The entropy of the labels themselves, which the log used to show, is 0.6 nats lower."""
    rng = np.random.default_rng(0)
    counts = np.round(1e6 / np.arange(1, 2001)).astype(np.int64)
    labels = rng.choice(2000, 1500, p=counts / counts.sum())
    label_counts = np.bincount(labels, minlength=2010)
    log_probability = log_unigram(counts, np.zeros(2000, bool))
    truth = -(np.exp(log_probability) * log_probability).sum()
    own = label_counts[label_counts > 0] / label_counts.sum()
    assert cross_entropy(label_counts, log_probability) == pytest.approx(truth, abs=0.15)
    assert -(own * np.log(own)).sum() < truth - 0.4
    assert cross_entropy(np.array([3, 1]), np.log([0.75, 0.25])) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )


def test_a_dataset_of_unknown_characters_is_refused_before_training(tokenizer, tmp_path):
    text = np.tile([tokenizer.piece_to_id("▁"), tokenizer.unk_id], 150)
    write(tmp_path / "unknown", [text], tokenizer=tokenizer)
    data = PretrainingData(TokenStore(tmp_path / "unknown"), tokenizer, DataSection(), 32, seed=1)
    with pytest.raises(TokenStoreError, match=r"nothing to learn from: all of its 300 tokens are \[UNK\]"):
        data.check_training()


def test_one_piece_among_unknown_ones_is_enough_to_begin(tokenizer, tmp_path):
    document = np.full(300, tokenizer.unk_id)
    document[290] = 100
    write(tmp_path / "rare", [document], tokenizer=tokenizer)
    data = PretrainingData(TokenStore(tmp_path / "rare"), tokenizer, DataSection(), 32, seed=1)
    data.check_training()
    data.check_held_out(0)
    with pytest.raises(TokenStoreError, match="no token of its 5 rows"):
        data.check_held_out(5)
