import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deberta_xl.data.masking import Masker
from deberta_xl.data.random_numbers import derive
from deberta_xl.data.words import LONGEST_WORD, PART
from deberta_xl.settings.pretraining import DataSection

PIECES, MASK, VOCAB = 1000, 1000, 1040
STYLES = ["unbiased", "original"]


def tables() -> dict:
    """Ids 4 … 699 begin words, 700 … 999 continue them; 1000 is [MASK], then spare ids."""
    special = np.zeros(VOCAB, bool)
    special[:4] = special[MASK:] = True
    word_starts = np.ones(VOCAB, bool)
    word_starts[700:PIECES] = False
    return {"word_starts": word_starts, "special": special, "mask_id": MASK}


def make_masker(**rule) -> Masker:
    return Masker(DataSection(**rule), **tables())


def make_rows(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows full of random words of one to about four tokens, [CLS] and [SEP] at the ends."""
    input_ids = np.random.default_rng(seed).integers(4, PIECES, (rows, length))
    input_ids[:, 0], input_ids[:, -1] = 1, 2
    return input_ids, np.ones_like(input_ids)


def words_of(input_ids: np.ndarray, segments: np.ndarray, style: str = "original") -> list[list[int]]:
    """Columns of each word of one row, the plain way (rule 1)."""
    words, previous = [], None
    vocabulary = tables()
    for column, (token, segment) in enumerate(zip(input_ids, segments, strict=True)):
        if segment == 0 or vocabulary["special"][token]:
            continue
        if vocabulary["word_starts"][token] or segment != previous:
            words.append([])
        words[-1].append(column)
        previous = segment
    if style == "original":
        return words
    cuts = [PART if len(word) > LONGEST_WORD else LONGEST_WORD for word in words]
    return [word[at : at + cut] for word, cut in zip(words, cuts, strict=True) for at in range(0, len(word), cut)]


def original_in_plain_python(input_ids, segments, rng, probability=0.15, max_ngram=3) -> list[int]:
    """Labelled columns by the first release's procedure, step by step."""
    words = words_of(input_ids, segments)
    window = int(1 / probability)
    marks = [False] * len(words)
    offset = 0
    while offset < len(words):
        n = rng.choices(range(1, max_ngram + 1), [1 / k for k in range(1, max_ngram + 1)])[0]
        context = min(window * n, len(words) - offset)
        start = offset + rng.randint(0, context - 1)
        end = min(start + n, len(words))
        marks[start:end] = [True] * (end - start)
        offset = max(offset + context, end)
    quota = max(1, round(probability * int((segments > 0).sum())))
    labelled: list[int] = []
    for mark, word in zip(marks, words, strict=True):
        if mark:
            labelled += word
            if len(labelled) >= quota:
                break
    return labelled


def labels_of_many(masker: Masker, input_ids, segments, repeats: int) -> np.ndarray:
    """bool [repeats · rows, S]: what is labelled under ever new keys."""
    keys = [derive(11, epoch, np.arange(len(input_ids))) for epoch in range(repeats)]
    return np.concatenate([masker.mask(input_ids, segments, k)[1] > 0 for k in keys])


def assert_equal_rates(samples_a: np.ndarray, samples_b: np.ndarray, errors: float = 5.0) -> None:
    """The means of two samples [rows, bins] agree within some standard errors, estimated from the rows themselves."""
    variance = samples_a.var(axis=0) / len(samples_a) + samples_b.var(axis=0) / len(samples_b)
    assert np.all(np.abs(samples_a.mean(axis=0) - samples_b.mean(axis=0)) < errors * np.sqrt(variance))


def by_decile(labelled: np.ndarray) -> np.ndarray:
    """Share of labelled tokens in each tenth of the row (without [CLS] and [SEP]), [rows, 10]."""
    inner = labelled[:, 1:-1].astype(float)
    return np.stack([part.mean(axis=1) for part in np.array_split(inner, 10, axis=1)], axis=1)


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_unbiased_masks_every_tenth_of_the_row_alike(max_ngram):
    input_ids, segments = make_rows(100, 130)
    deciles = by_decile(labels_of_many(make_masker(max_ngram=max_ngram), input_ids, segments, 120))
    error = deciles.std(axis=0) / np.sqrt(len(deciles))
    # 10 bins at 4.5 standard errors: a chance of 7e-5 of failing without cause. It would see a twentieth of the rate.
    assert np.all(np.abs(deciles.mean(axis=0) - deciles.mean()) < 4.5 * error)
    assert 4.5 * error.max() < 0.0075


def test_unbiased_masks_the_first_and_the_last_word_like_any_other():
    input_ids, segments = make_rows(100, 66)
    input_ids[:, 1:-1] %= 600
    input_ids[:, 1:-1] += 4
    labelled = labels_of_many(make_masker(), input_ids, segments, 150)
    rates = labelled[:, 1:-1].mean(axis=0)
    error = np.sqrt(rates.mean() * (1 - rates.mean()) / len(labelled))
    assert np.all(np.abs(rates - rates.mean()) < 5 * error)


def test_original_neglects_the_end_of_the_row_as_the_first_release_did():
    input_ids, segments = make_rows(60, 512)
    deciles = by_decile(labels_of_many(make_masker(masking="original"), input_ids, segments, 20)).mean(axis=0)
    # 16.6 % before the quota is met, and a small fraction of it in the last tenth.
    assert np.allclose(deciles[1:7], 0.166, atol=0.01)
    assert deciles[9] < 0.06


@pytest.mark.parametrize("max_ngram", [2, 3])
@pytest.mark.parametrize("length", [40, 200])
def test_original_has_the_distribution_of_the_plain_procedure(length, max_ngram):
    input_ids, segments = make_rows(40, length, seed=length)
    labelled = labels_of_many(make_masker(masking="original", max_ngram=max_ngram), input_ids, segments, 40)
    rng = random.Random(1)
    plain = np.zeros_like(labelled)
    for number, row in enumerate(plain):
        row[original_in_plain_python(input_ids[number % 40], segments[0], rng, max_ngram=max_ngram)] = True
    assert_equal_rates(by_decile(labelled), by_decile(plain))
    assert_equal_rates(run_lengths(labelled), run_lengths(plain))
    totals = [array.sum(axis=1, keepdims=True).astype(float) for array in (labelled, plain)]
    assert_equal_rates(*totals)


def run_lengths(labelled: np.ndarray) -> np.ndarray:
    """How many runs of 1, 2, … 8 labelled tokens each row has, [rows, 8]."""
    edges = np.diff(np.pad(labelled.astype(int), ((0, 0), (1, 1))), axis=1)
    counts = np.zeros((len(labelled), 8))
    for row, edge in enumerate(edges):
        lengths = np.flatnonzero(edge == -1) - np.flatnonzero(edge == 1)
        np.add.at(counts[row], lengths[lengths <= 8] - 1, 1)
    return counts


@pytest.mark.parametrize("style", STYLES)
def test_ngrams_of_n_words_come_with_probability_proportional_to_1_over_n(style):
    _, counts = make_masker(masking=style, max_ngram=4).spans(np.full(500, 2000), derive(3, np.arange(500)))
    # The last window of a row may be cut short; the first fifty are whole.
    lengths = counts[:, :50].ravel()
    for n in range(1, 5):
        share = (1 / n) / sum(1 / k for k in range(1, 5))
        assert abs(np.mean(lengths == n) - share) < 5 * np.sqrt(share * (1 - share) / lengths.size)


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("length", [64, 512])
def test_unbiased_labels_the_asked_share_of_the_tokens_on_average(probability, length):
    input_ids, segments = make_rows(50, length)
    masker = make_masker(mask_probability=probability)
    counts = labels_of_many(masker, input_ids, segments, 20 if length == 512 else 200).sum(axis=1)
    error = counts.std() / np.sqrt(len(counts)) / (probability * length)
    # Exact on average; 4 standard errors are 1.5 % at most, for the few labels of short rows.
    assert abs(counts.mean() / (probability * length) - 1) < 4 * error < 0.015
    longest_word = max(len(word) for row in input_ids for word in words_of(row, segments[0]))
    assert counts.max() < probability * length + 1 + longest_word


def test_original_stops_with_the_word_that_meets_the_quota():
    input_ids, segments = make_rows(50, 512)
    labelled = labels_of_many(make_masker(masking="original"), input_ids, segments, 20)
    longest_word = max(len(word) for row in input_ids for word in words_of(row, segments[0]))
    assert labelled.sum(axis=1).max() < 77 + longest_word
    assert np.median(labelled.sum(axis=1)) >= 77


@pytest.mark.parametrize("style", STYLES)
def test_labelled_tokens_are_masked_replaced_and_kept_80_10_10(style):
    input_ids, segments = make_rows(200, 256)
    masked, labels = make_masker(masking=style).mask(input_ids, segments, derive(1, np.arange(200)))
    is_labelled = labels > 0
    shown, original = masked[is_labelled], input_ids[is_labelled]
    random_share = 0.1 * (1 - 1 / PIECES)
    for share, observed in (
        (0.8, shown == MASK),
        (random_share, (shown != original) & (shown != MASK)),
        (0.2 - random_share, shown == original),
    ):
        # The original may draw [MASK] or the token itself as "random": 1 in 1000 of a tenth, far inside the error.
        assert abs(observed.mean() - share) < 5 * np.sqrt(share * (1 - share) / is_labelled.sum())


def test_unbiased_replaces_by_ordinary_tokens_only_and_original_by_the_whole_vocabulary():
    input_ids, segments = make_rows(300, 256)
    drawn = {}
    for style in STYLES:
        masker = make_masker(masking=style, replace_with_mask=0.0, replace_with_random=1.0)
        masked, labels = masker.mask(input_ids, segments, derive(2, np.arange(300)))
        drawn[style] = masked[labels > 0]
    assert drawn["unbiased"].min() == 4
    assert drawn["unbiased"].max() == PIECES - 1
    assert drawn["original"].min() == 0
    assert drawn["original"].max() == MASK
    counts, _ = np.histogram(drawn["unbiased"], bins=10, range=(4, PIECES))
    expected = len(drawn["unbiased"]) / 10
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.9)


def test_a_row_is_masked_alike_in_any_batch():
    input_ids, segments = make_rows(20, 100)
    segments[3, 50:] = 0
    for style in STYLES:
        masker = make_masker(masking=style)
        keys = derive(4, 2, np.arange(20))
        together = masker.mask(input_ids, segments, keys)
        order = np.random.default_rng(0).permutation(20)
        shuffled = masker.mask(input_ids[order], segments[order], keys[order])
        alone = [masker.mask(input_ids[r : r + 1], segments[r : r + 1], keys[r : r + 1]) for r in range(20)]
        for part in range(2):
            assert np.array_equal(together[part][order], shuffled[part])
            assert np.array_equal(together[part], np.concatenate([a[part] for a in alone]))


def test_epochs_and_seeds_mask_differently():
    input_ids, segments = make_rows(10, 200)
    masker = make_masker()
    masks = [masker.mask(input_ids, segments, derive(s, e, np.arange(10)))[1] > 0 for s in (0, 1) for e in (0, 1)]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            # Independent masks of 15 % share 15 % of their labels: far less than half.
            assert (mask & other).sum() < 0.5 * mask.sum()


def test_words_are_not_joined_across_documents():
    # Two documents; the second begins in the middle of a word.
    row = np.array([[1, 10, 800, 2, 1, 801, 802, 2, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    masker = make_masker(mask_probability=0.3)
    labelled = labels_of_many(masker, row, segments, 200)
    assert np.array_equal(labelled[:, 1], labelled[:, 2])
    assert np.array_equal(labelled[:, 5], labelled[:, 6])
    assert np.any(labelled[:, 2] != labelled[:, 5])


def test_the_original_masks_single_tokens_when_ngrams_are_single():
    row = np.array([[1, 10, 800, 801, 802, 2]])
    masker = make_masker(masking="original", max_ngram=1)
    labelled = labels_of_many(masker, row, np.ones_like(row), 50)
    assert np.all(labelled.sum(axis=1) == 1)


def test_rows_without_words_have_no_labels():
    for style in STYLES:
        masker = make_masker(masking=style)
        empty = np.zeros((2, 8), int)
        specials = np.array([[1, 3, 3, 2, 0, 0, 0, 0]])
        masked, labels = masker.mask(empty, empty, derive(0, np.arange(2)))
        assert not masked.any()
        assert not labels.any()
        # Beside a row with words, too.
        full = np.array([[1, 5, 6, 7, 8, 9, 10, 2]])
        both = np.concatenate([full, specials])
        masked, labels = masker.mask(both, (both > 0).astype(int), derive(0, np.arange(2)))
        assert not labels[1].any()
        assert np.array_equal(masked[1], specials[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), style=st.sampled_from(STYLES), probability=st.floats(0.01, 0.95), max_ngram=st.integers(1, 5))
def test_any_batch_is_masked_by_whole_words_and_without_touching_anything_else(data, style, probability, max_ngram):
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    input_ids = rng.integers(0, VOCAB, shape)
    segments = np.cumsum(rng.random(shape) < 0.1, axis=1) * (rng.random(shape) < 0.9)
    before = input_ids.copy()
    masker = make_masker(masking=style, mask_probability=probability, max_ngram=max_ngram)
    masked, labels = masker.mask(input_ids, segments, derive(0, np.arange(shape[0])))
    assert np.array_equal(input_ids, before)
    is_labelled = labels > 0
    assert np.array_equal(labels, np.where(is_labelled, input_ids, 0))
    assert np.array_equal(masked[~is_labelled], input_ids[~is_labelled])
    assert not np.any(is_labelled & ((segments == 0) | tables()["special"][input_ids]))
    if style == "unbiased" or max_ngram > 1:
        for row in range(shape[0]):
            for word in words_of(input_ids[row], segments[row], style):
                assert len(set(is_labelled[row, word])) == 1
