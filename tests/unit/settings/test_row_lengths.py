"""Which steps have rows of which length."""

from __future__ import annotations

import pytest

from deberta_xl.settings.presets import load_run_config
from deberta_xl.settings.row_lengths import Stretch, stretches


def test_shares_of_the_steps_become_steps_and_the_longest_rows_have_the_rest():
    assert stretches("512:0.8,2048:0.15", 8192, 1000) == [
        Stretch(512, 1, 800, 16),
        Stretch(2048, 801, 950, 4),
        Stretch(8192, 951, 1000, 1),
    ]
    assert stretches(None, 512, 7) == [Stretch(512, 1, 7, 1)]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 999_999])
def test_every_step_has_one_length_however_few_there_are(steps):
    found = stretches("8:0.1,16:0.2,32:0.3", 64, steps)
    assert [s for stretch in found for s in range(stretch.first_step, stretch.last_step + 1)] == [*range(1, steps + 1)]
    assert (found[-1].length, found[-1].last_step) == (64, steps)


def test_a_step_and_those_prepared_beyond_the_last_find_their_length():
    config = load_run_config("debug", ["train.steps=10", "schedule.warmup_steps=0", "train.lengths=32:0.25,64:0.5"])
    assert [config.stretch_at(step).length for step in (1, 2, 3, 8, 9, 10, 12)] == [32, 32, 64, 64, 128, 128, 128]
