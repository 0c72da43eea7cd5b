import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deberta_xl.data.sampler import sample_rows


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_each_epoch_visits_every_row_once(size, seed, epoch):
    epochs, rows = sample_rows(seed, size, epoch * size, size)
    assert np.array_equal(np.sort(rows), np.arange(size))
    assert np.all(epochs == epoch)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), first=st.integers(0, 1000), count=st.integers(1, 200), cut=st.integers(0, 200))
def test_the_order_does_not_depend_on_how_it_is_asked_for(size, first, count, cut):
    cut = min(cut, count)
    whole = np.stack(sample_rows(5, size, first, count))
    parts = [np.stack(sample_rows(5, size, *part)) for part in ((first, cut), (first + cut, count - cut))]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))


def test_a_corpus_of_a_hundred_billion_rows_is_permuted_within_bounds():
    size = 10**11
    _, rows = sample_rows(1, size, 3 * size - 5000, 5000)
    assert rows.min() >= 0
    assert rows.max() < size
    assert len(np.unique(rows)) == 5000


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [sample_rows(seed, 1000, epoch * 1000, 1000)[1] for seed in range(3) for epoch in range(3)]
    # Two random orders of n agree in 1 place on average (Poisson); more than 10 has a chance below 1e-7.
    agreements = [int(np.sum(a == b)) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) <= 10


@pytest.mark.parametrize("size", [2, 3, 5, 16, 37])
def test_every_row_is_equally_likely_at_every_place(size):
    seeds = 1500
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), sample_rows(seed, size, 0, size)[1]] += 1
    # 5 standard errors of a binomial count; at most 37² cells are looked at.
    error = np.sqrt(seeds / size * (1 - 1 / size))
    assert np.abs(counts - seeds / size).max() < 5 * error


def test_neighbours_in_the_corpus_are_not_neighbours_in_the_order():
    size = 20_000
    rows = sample_rows(7, size, 0, size)[1].astype(float)
    # Correlations of random orders have a standard deviation of 1/√n.
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(rows, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
