"""The proof that a change of structure changes no number: it gives the same file twice, and notices what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unchanged import differences, main
from unchanged_cases import all_cases


def case(**steps: float) -> dict:
    """A case with a loss for some steps, and a weight."""
    figures = {step.removeprefix("step"): {"loss": loss.hex()} for step, loss in steps.items()}
    return {"steps": figures, "weights": {"weights: table": "12ab"}}


def test_names_of_cases_are_unique_and_twins_come_first():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    for number, other in enumerate(all_cases()):
        assert other.equals is None or other.equals in names[:number]


def test_the_first_step_that_differs_is_named_with_both_values():
    before, after = case(step1=1.0, step2=0.1, step10=3.0), case(step1=1.0, step2=0.1 + 2**-56, step10=4.0)
    assert list(differences("mlm", before, before)) == []
    assert list(differences("mlm", before, after)) == ["mlm: first at step 2 of 10: loss 0.1 -> 0.10000000000000002"]


def test_a_lost_step_a_new_step_and_another_weight_are_differences_and_a_new_figure_is_none():
    whole = case(step1=1.0, step2=2.0)
    assert list(differences("mlm", whole, case(step1=1.0))) == ["mlm: first at step 2 of 2: loss 2.0 -> missing"]
    assert list(differences("mlm", case(step1=1.0), whole)) == ["mlm: first at step 2, which was not there before"]
    other = {**whole, "weights": {"weights: table": "34cd"}}
    assert list(differences("mlm", whole, other)) == ["mlm: weights: 1 of 1 differ, the first is weights: table"]
    more = {**whole, "steps": {step: {**values, "new": "0x0.0p+0"} for step, values in whole["steps"].items()}}
    assert list(differences("mlm", whole, more)) == []
    assert list(differences("mlm", whole, None)) == ["mlm: only in the file (fails here, or is gone)"]


@pytest.mark.full
@pytest.mark.parametrize("part", ["mlm-tp2-sliced", "task-span"])
def test_the_same_code_gives_the_same_numbers_twice(tmp_path: Path, part: str):
    file = tmp_path / "numbers.json"
    assert main(["write", str(file), "--only", part]) == 0
    assert main(["compare", str(file), "--only", part]) == 0
    assert any(found["weights"] for found in json.loads(file.read_text())["cases"].values() if "weights" in found)
