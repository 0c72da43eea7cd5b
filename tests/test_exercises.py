"""CONTRIBUTING's exercises, "to add …, touch these files": each list is short, its files are there, its test is there;
a setting and a task's metric are added here to a copy of the package, in the files of their lists and no others.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from architecture.sources import PACKAGE, ROOT

MAX_FILES = 6
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDED = ("an objective", "a kernel", "a parameter of the model", "a metric", "a setting")


class Exercise(NamedTuple):
    """What is said of adding one thing."""

    files: list[str]
    """Those to touch, `NAME` standing for a new one, `ROOM` for any room."""
    tests: list[str]
    """file::test that proves it."""


def exercise(thing: str) -> Exercise:
    """What CONTRIBUTING says under "To add `thing`"."""
    text = CONTRIBUTING.partition(f"### To add {thing}\n")[2].partition("\n#")[0]
    steps, _, proof = text.partition("Checked by")
    files = re.findall(r"^\d\. `([^`]+)`", steps, re.MULTILINE)
    return Exercise(files, re.findall(r"`([^`]+::[^`]+)`", proof))


@pytest.mark.parametrize("thing", ADDED)
def test_little_has_to_be_touched_and_it_is_there(thing):
    files, tests = exercise(thing)
    assert 0 < len(files) <= MAX_FILES
    for path in files:
        place = ROOT / re.split(r"/\w*(?:NAME|ROOM)", path)[0]
        assert place.exists(), f"{path}: CONTRIBUTING says to touch it"
    assert tests, f"no test is named that checks how to add {thing}"
    for test in tests:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package, to be changed."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=ignored)
    return tmp_path


def insert(copy: Path, path: str, after: str, text: str) -> None:
    """Put `text` behind the first `after` in a file of the copy that its exercise names."""
    content = (copy / path).read_text(encoding="utf-8")
    assert after in content, f"{path} has no {after!r} any more"
    (copy / path).write_text(content.replace(after, after + text, 1), encoding="utf-8")


def run(copy: Path, program: str) -> str:
    """What a program says that imports the copy."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_setting_is_a_field_with_its_sentence_and_its_check(copy):
    path = "deberta_xl/settings/pretraining.py"
    assert path in exercise("a setting").files
    insert(copy, path, 'masks and dropout."""\n', '    cooldown_steps: int = 3\n    """How long to wait."""\n')
    insert(copy, path, "        self.profile_steps()\n", "        at_least(1, cooldown_steps=self.cooldown_steps)\n")
    said = run(
        copy,
        """
from deberta_xl.settings.presets import load_run_config, to_toml
from deberta_xl.settings.reference import as_markdown

assert "cooldown_steps = 5" in to_toml(load_run_config("debug", ["train.cooldown_steps=5"]))
assert "| `cooldown_steps` | whole number | `3` | at least 1 | How long to wait. |" in as_markdown()
for wrong in ("train.cooldwon_steps=5", "train.cooldown_steps=0", "train.cooldown_steps=often"):
    try:
        load_run_config("debug", [wrong])
    except ValueError as error:
        print(error)
""",
    )
    assert [
        word in said for word in ("did you mean 'cooldown_steps'", "at least 1", "train.cooldown_steps='often'")
    ] == [True] * 3


def test_a_metric_is_a_name_and_a_function(copy):
    names, functions = "deberta_xl/tasks/task.py", "deberta_xl/tasks/metrics.py"
    assert {names, functions} <= set(exercise("a metric").files)
    insert(copy, names, "Metric = Literal[\n", '    "balanced_accuracy",\n')
    insert(copy, names, '    "classification": (\n', '        "balanced_accuracy",\n')
    line = '    "balanced_accuracy": lambda scored: float(sk.balanced_accuracy_score(scored.gold, scored.values)),\n'
    insert(copy, functions, "float | None]] = {\n", line)
    (copy / "own.toml").write_text(
        'head = "classification"\nmetrics = ["balanced_accuracy"]\n[[sources]]\nfiles = {train = "a.tsv"}\n'
        'first = "text"\nlabel = "label"\n'
    )
    said = run(
        copy,
        """
import numpy as np
from deberta_xl.tasks.metrics import evaluate_metrics, is_better
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.task import Example, load_task

examples = [Example(str(n), ("a text",), label) for n, label in enumerate((0, 0, 0, 1))]
found = [Prediction(value, np.ones(2)) for value in (0, 0, 1, 1)]
print(evaluate_metrics(load_task("own.toml"), ["no", "yes"], examples, found), is_better("balanced_accuracy", 0.5, 0.4))
""",
    )
    assert re.fullmatch(r"\{'balanced_accuracy': 0\.83\d+\} True\n", said)
