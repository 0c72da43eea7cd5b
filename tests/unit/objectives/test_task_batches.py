"""The order of a task's examples: every one once an epoch, the same on any number of ranks, lengths together."""

from __future__ import annotations

import numpy as np
import pytest

from deberta_xl.objectives.task_batches import TaskOrder

LENGTHS = np.random.default_rng(1).integers(5, 60, 70)


def steps(order: TaskOrder, first: int, last: int) -> np.ndarray:
    """The features of some steps, one after the other."""
    return np.concatenate([order.features(step) for step in range(first, last + 1)])


@pytest.mark.parametrize("bucketing", [True, False])
def test_every_example_comes_once_an_epoch(bucketing):
    order = TaskOrder(LENGTHS, 10, seed=3, bucketing=bucketing)
    first, second = steps(order, 1, 7), steps(order, 8, 14)
    assert sorted(first) == sorted(second) == list(range(70))
    assert list(first) != list(second)


def test_bucketing_spares_padding_and_keeps_batches_in_random_order():
    def padding(bucketing: bool) -> int:
        order = TaskOrder(LENGTHS, 10, seed=3, bucketing=bucketing)
        batches = [LENGTHS[order.features(step)] for step in range(1, 8)]
        return sum(int(batch.max() * len(batch) - batch.sum()) for batch in batches)

    assert padding(True) < padding(False) / 2
    order = TaskOrder(LENGTHS, 10, seed=3, bucketing=True)
    longest = [LENGTHS[order.features(step)].max() for step in range(1, 8)]
    assert longest != sorted(longest)


def test_an_example_comes_at_most_twice_in_a_pool_of_a_small_task():
    order = TaskOrder(LENGTHS[:9], 4, seed=3, bucketing=True)
    for step in range(1, 20):
        assert np.bincount(order.features(step)).max() <= 2


def test_seeds_and_steps_alone_decide():
    order, again = (TaskOrder(LENGTHS, 10, seed=3, bucketing=True) for _ in range(2))
    again.features(30)  # asked for in another order
    assert np.array_equal(order.features(12), again.features(12))
    assert not np.array_equal(order.features(12), TaskOrder(LENGTHS, 10, seed=4, bucketing=True).features(12))
