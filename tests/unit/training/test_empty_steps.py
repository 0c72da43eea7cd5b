"""Steps in which no token of the whole batch is to be predicted."""

import pytest

from deberta_xl.base.errors import HopelessRunError
from deberta_xl.training import empty_steps as module
from deberta_xl.training.empty_steps import PATIENCE, EmptySteps


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged on rank 0."""
    lines: list[str] = []
    monkeypatch.setattr(module, "rank_zero", lambda text, *values, level: lines.append(text % values))
    return lines


def test_a_step_without_labels_is_said_and_a_run_of_them_ends_training(said):
    steps = EmptySteps(10_000, "give longer rows")
    for step in range(1, 3 * PATIENCE, 2):  # every second step by chance
        steps.check(step, 0)
        steps.check(step + 1, 7)
    assert len(said) == 3
    assert said[0] == "step 1 has no label to learn from (1 so far): its loss does not count. give longer rows"
    for step in range(1000, 1000 + PATIENCE - 1):
        steps.check(step, 0)
    with pytest.raises(
        HopelessRunError, match=r"none of the last 100 steps had a label .*up to step 1099.*give longer rows"
    ):
        steps.check(1000 + PATIENCE - 1, 0)


def test_a_short_run_in_which_no_step_has_a_label_is_never_done(said):
    steps = EmptySteps(3, "give longer rows")
    steps.check(1, 0)
    steps.check(2, 0)
    with pytest.raises(HopelessRunError, match="none of the last 3 steps"):
        steps.check(3, 0)
    resumed = EmptySteps(3, "give longer rows")
    resumed.check(3, 0)  # the other two may have had some
