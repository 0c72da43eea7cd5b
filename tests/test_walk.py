"""CONTRIBUTING.md's walk from the command to the first step: every file is there, and is called from one before it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
STOP = re.compile(r"^\d+\. `(?P<path>deberta_xl/[\w/]+\.py)`(?:: `(?P<name>\w+)`)?", re.MULTILINE)
MOST_FILES = 15
HEADING = "### From the command to the first step"


def called_names(tree: ast.Module) -> set[str]:
    """What a file calls: `f(…)`, `x.f(…)`."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(function, "id", getattr(function, "attr", "")) for function in functions}


def defined_names(tree: ast.Module) -> set[str]:
    """Functions, methods and classes of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_the_walk_to_the_first_step_is_short_and_each_file_is_called_from_one_before_it():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(HEADING)[2]
    stops = list(STOP.finditer(text.partition("\n#")[0]))
    paths = [stop["path"] for stop in stops]
    assert paths[0] == "deberta_xl/pretrain.py"
    assert len(set(paths)) == len(paths) <= MOST_FILES
    assert stops[-1]["name"] == "run_step"
    called: set[str] = set()
    for number, stop in enumerate(stops):
        tree = ast.parse((ROOT / stop["path"]).read_text(encoding="utf-8"))
        if number:
            assert stop["name"] in defined_names(tree), f"{stop['path']} has no {stop['name']}"
            assert stop["name"] in called, f"no file before {stop['path']} calls {stop['name']}"
        called |= called_names(tree)
