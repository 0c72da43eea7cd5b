"""When sums of gradients are begun: in one order, and not before they are complete."""

from __future__ import annotations

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.training.zero1.readiness import Readiness


def test_nothing_is_begun_before_an_order_is_agreed():
    ready = Readiness([1, 2, 1])
    assert [ready.arrive(*which) for which in ((2, 0), (1, 1), (1, 0), (0, 0))] == [[]] * 4
    assert ready.complete == [2, 1, 0]
    assert ready.rest() == [0, 1, 2]


def test_a_sum_waits_for_its_last_gradient_and_for_those_before_it():
    ready = Readiness([1, 2, 1])
    ready.order = [2, 1, 0]
    for _ in range(2):
        assert ready.arrive(0, 0) == []
        assert ready.arrive(2, 0) == [2]
        assert ready.arrive(1, 1) == []
        assert ready.arrive(1, 0) == [1, 0]
        assert ready.rest() == []
        ready.forget()


def test_what_does_not_arrive_or_is_in_no_order_is_begun_at_the_end_in_the_same_order():
    ready = Readiness([1, 1, 1, 1])
    ready.order = [3, 1]
    assert ready.arrive(1, 0) == []
    assert ready.rest() == [3, 1, 0, 2]
    assert ready.arrive(3, 0) == [3, 1]
    assert ready.rest() == [0, 2]


def test_a_gradient_that_comes_twice_is_an_error_that_says_what_to_do():
    ready = Readiness([2])
    ready.arrive(0, 1)
    with pytest.raises(ConfigError, match=r'Give back the sum of several, or set "overlap_comm": false'):
        ready.arrive(0, 1)
