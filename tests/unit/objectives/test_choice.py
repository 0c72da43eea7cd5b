"""`train.objective`: what is found behind a name, and with which words others are refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.objectives.choice import BUILT_IN, built_in_of, check_objective, objective_type
from deberta_xl.objectives.objective import Staged

SOURCE = """
from deberta_xl.objectives.pretraining import Pretraining

class Whole(Pretraining):
    def build(self): ...
    def losses(self, model, batch, shares, key): ...

class Half(Pretraining):
    def build(self): ...

class Other: ...
"""
ON_ANOTHER = """
from deberta_xl.objectives.masked_lm import MaskedLM

class Drawn(MaskedLM):
    def curves(self, lines): ...

class Weighed(Drawn):
    def losses(self, model, batch, shares, key): ...

class Divided(Weighed):
    def stage_sums(self, batch, shares, loss, guesses): ...

class Other(MaskedLM):
    def micro_batch(self, batch): ...
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The working directory, with modules of a user's."""
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "derived.py").write_text(ON_ANOTHER)
    (tmp_path / "broken.py").write_text("import a_library_that_is_not_here")
    (tmp_path / "wrong.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("mine", "derived", "broken", "wrong"):
        sys.modules.pop(name, None)


def test_a_class_in_the_working_directory_is_found_and_hides_nothing(folder):
    (folder / "json.py").write_text("1 / 0")
    assert objective_type("mine:Whole").__name__ == "Whole"
    assert sys.path[-1] == str(folder)
    check_objective("mine:Whole", num_stages=1)


def test_masked_language_modelling_goes_through_stages():
    check_objective("masked_lm", num_stages=4)
    assert issubclass(objective_type("masked_lm"), Staged)


def test_a_class_is_known_by_the_built_in_one_that_it_inherits_from():
    assert [built_in_of(name) for name in BUILT_IN] == list(BUILT_IN)
    assert built_in_of("derived:Divided") == "masked_lm"
    assert built_in_of("mine:Whole") is None


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_table_says_of_a_built_in_objective_what_its_class_says(name):
    assert issubclass(objective_type(name), Staged) is (BUILT_IN[name].why_no_stages is None)


def test_a_pipeline_of_two_models_is_refused_with_the_reason():
    check_objective("replaced_tokens", num_stages=1)
    with pytest.raises(ConfigError, match=r"trains two models .* parallel.pipeline_parallel_size=2 cannot be"):
        check_objective("replaced_tokens", num_stages=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("masked_ml", "masked_lm, causal, prefix, mixed, replaced_tokens, or PACKAGE.MODULE:CLASS, as in"),
        ("mine:", "no such objective"),
        ("nobody.mine:Whole", "there is no module nobody on PYTHONPATH or in "),
        ("mine.inner:Whole", "there is no module mine.inner"),
        ("broken:Whole", "importing broken fails: No module named 'a_library_that_is_not_here'"),
        ("wrong:Whole", "importing wrong fails with ZeroDivisionError: division by zero"),
        ("mine:Hole", "has no class Hole below deberta_xl.objectives.pretraining.Pretraining; it has Whole, Half"),
        ("mine:Other", "has no class Other below"),
        ("mine:Half", "Half has no losses yet; write it"),
    ],
)
def test_what_cannot_be_an_objective_is_refused_with_what_to_type(name, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_objective(name, num_stages=1)


def test_stages_are_refused_where_the_objective_does_not_say_what_they_do():
    with pytest.raises(ConfigError, match=r"parallel\.pipeline_parallel_size=2 cannot be: leave it at 1, and divide"):
        check_objective("mine:Whole", num_stages=2)


def test_the_stages_of_another_objective_are_refused_to_a_loss_of_ones_own():
    check_objective("derived:Weighed", num_stages=1)
    for name in ("derived:Drawn", "derived:Divided", "derived:Other"):
        check_objective(name, num_stages=2)
    with pytest.raises(ConfigError, match="Weighed has losses of its own, but the stages of MaskedLM: leave parallel"):
        check_objective("derived:Weighed", num_stages=2)
