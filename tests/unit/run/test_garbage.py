"""Garbage that refers to itself is collected where the loop says so, and nowhere else."""

from __future__ import annotations

import gc
import weakref

import pytest

from deberta_xl.run.garbage import STEPS_BETWEEN, collected_by_steps


class Ring:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_nothing_is_collected_between_two_steps_that_are_due():
    assert gc.isenabled()
    with collected_by_steps() as after_step:
        gone = weakref.ref(Ring())
        kept = [[] for _ in range(100_000)]  # ten times what makes Python look
        assert gone() is not None
        after_step(STEPS_BETWEEN + 1)
        assert gone() is not None
        after_step(2 * STEPS_BETWEEN)
        assert gone() is None
    assert len(kept) == 100_000
    assert gc.isenabled()


def test_python_collects_as_before_after_a_loop_that_failed():
    with pytest.raises(ValueError, match="diverged"), collected_by_steps():
        raise ValueError("diverged")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
