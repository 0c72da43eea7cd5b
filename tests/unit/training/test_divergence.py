"""A run without finite losses ends; one that finds back, or searches its loss scale, goes on."""

from __future__ import annotations

import math

import pytest

from deberta_xl.errors import UserError
from deberta_xl.training.divergence import PATIENCE, Divergence


@pytest.mark.parametrize("bad", [{"loss": math.nan, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": math.inf}])
def test_a_run_that_stays_without_finite_values_ends_with_the_step_where_it_began(bad):
    divergence = Divergence()
    for step in range(10, 10 + PATIENCE - 1):
        divergence.check(step, bad)
    with pytest.raises(UserError, match="not been finite since step 10"):
        divergence.check(10 + PATIENCE, bad)


def test_a_finite_step_begins_the_count_anew():
    divergence = Divergence()
    for step in range(3 * PATIENCE):
        divergence.check(step, {"loss": math.nan if step % PATIENCE else 1.0, "grad_norm": 1.0})
