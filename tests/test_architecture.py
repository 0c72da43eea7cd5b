"""The shape of the source: who imports whom, how large things are, what is documented, what is never written.

Files are parsed, not imported. Each rule (`tests/architecture/`) is a function from parsed files to complaints
(file:line, what is wrong, what to do). One test applies it to the repository, another to a small offender that it has
to find.
"""

from __future__ import annotations

import re

import pytest
from architecture import floors
from architecture.floors import FLOORS, circles, forbidden_libraries, imports_from_outside, imports_that_go_up
from architecture.habits import missing_docstrings, missing_types, pickles, prints, unsafe_loads
from architecture.measures import (
    MAX_FILE_LINES,
    MAX_FILES_IN_A_ROOM,
    MAX_FUNCTION_LINES,
    MAX_LOOSE_FILES,
    MIN_LINES_TO_SHARE,
    arrows_between_rooms,
    full_rooms,
    long_files,
    long_functions,
    repeated_lines,
)
from architecture.sources import PACKAGE, ROOT, Source, parse, read_sources

LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
LONG_FILE = "x = 1\n" * (MAX_FILE_LINES + 1)
FULL_ROOM = {f"model/file_{number:02}.py": "" for number in range(MAX_FILES_IN_A_ROOM + 1)}
LOOSE_FILES = {f"file_{number}.py": "" for number in range(MAX_LOOSE_FILES + 1)}
ROOMS = [f"room_{number}" for number in range(11)]
"""As many as have 110 pairs, each importing every other one."""
ARROWS = {f"{room}/a.py": "\n".join(f"import {PACKAGE}.{other}.a" for other in ROOMS) for room in ROOMS}
ONE_MORE = {"room_0/b.py": f"import {PACKAGE}.room_11.a", "room_11/a.py": ""}


def distinct(name: str, number: int) -> str:
    """So many lines of code that no other name has."""
    return "".join(f"{name}_{n} = {n}\n" for n in range(number))


SHARED = distinct("shared", 6)

RULES = {
    imports_that_go_up: ([PACKAGE], {"model/a.py": "def f():\n    import deberta_xl.training.loop"}),
    forbidden_libraries: ([PACKAGE], {"data/a.py": "def f():\n    import torch"}),
    circles: ([PACKAGE], {"model/a.py": "from deberta_xl.model import b", "model/b.py": "import deberta_xl.model.a"}),
    imports_from_outside: ([PACKAGE], {"model/a.py": "from tools.convert import main"}),
    unsafe_loads: ([PACKAGE, "tools", "tests"], {"a.py": "import torch\ntorch.load('x')"}),
    pickles: ([PACKAGE, "tools"], {"a.py": "from pickle import loads"}),
    prints: ([PACKAGE], {"a.py": "print(1)"}),
    missing_docstrings: ([PACKAGE, "tools"], {"a.py": '"""A."""\n\n\nclass B:\n    """B."""\n\n    def c(self): ...'}),
    missing_types: ([PACKAGE], {"a.py": "def f(x) -> int: ..."}),
    long_functions: ([PACKAGE, "tools"], {"a.py": LONG_FUNCTION}),
    long_files: ([PACKAGE], {"a.py": LONG_FILE}),
    full_rooms: ([PACKAGE], FULL_ROOM),
    arrows_between_rooms: ([PACKAGE, "tools", "benchmarks"], ARROWS | ONE_MORE),
    repeated_lines: (
        [PACKAGE],
        {"a.py": SHARED + distinct("a", MIN_LINES_TO_SHARE), "b.py": SHARED + distinct("b", 20)},
    ),
}

MORE_OFFENDERS = [
    (imports_that_go_up, {"kernels/a.py": "from deberta_xl.data import b", "data/b.py": ""}, 1),
    (imports_that_go_up, {"data/a.py": "from ..kernels.b import c"}, 1),
    (imports_that_go_up, {"data/a.py": "from .. import pretrain", "pretrain.py": ""}, 1),
    (imports_that_go_up, {"settings/a.py": "from deberta_xl import DebertaForMaskedLM"}, 1),
    (imports_that_go_up, {"helpers.py": "", "utilities/a.py": ""}, 2),
    (imports_that_go_up, {"model/a.py": "from deberta_xl.kernels.b import c\nfrom deberta_xl.settings.a import d"}, 0),
    (imports_that_go_up, {"pretrain.py": "from deberta_xl.training.loop import train"}, 0),
    (forbidden_libraries, {"model/a.py": "import torch\nx = torch.distributed.get_rank()"}, 1),
    (forbidden_libraries, {"model/a.py": "from torch import distributed"}, 1),
    (forbidden_libraries, {"kernels/a.py": "from megatron.core import tensor_parallel"}, 1),
    (forbidden_libraries, {"settings/a.py": "from torch import nn"}, 1),
    (forbidden_libraries, {"model/a.py": "import torch\nfrom torch import nn", "training/b.py": "import deepspeed"}, 0),
    (circles, {"a.py": "import deberta_xl.b", "b.py": "import deberta_xl.c", "c.py": "import deberta_xl.a"}, 1),
    (circles, {"a.py": "import deberta_xl.b", "b.py": "def f():\n    import deberta_xl.a"}, 0),
    (circles, {"a.py": "import deberta_xl.b", "b.py": "if TYPE_CHECKING:\n    import deberta_xl.a"}, 0),
    (unsafe_loads, {"a.py": "torch.load('x', weights_only=False)"}, 1),
    (unsafe_loads, {"a.py": "from torch import load"}, 1),
    (unsafe_loads, {"a.py": "np.load('x')\nnumpy.load('x', allow_pickle=True)"}, 2),
    (unsafe_loads, {"a.py": "torch.load('x', weights_only=True)\nnp.load('x', allow_pickle=False)"}, 0),
    (missing_docstrings, {"a.py": "x = 1"}, 1),
    (missing_docstrings, {"a.py": '"""A."""\ndef _private(): ...'}, 0),
    (missing_types, {"a.py": "class A:\n    def f(self, x: int): ..."}, 1),
    (missing_types, {"a.py": "class A:\n    def f(self, x: int, *rest: int) -> int: ..."}, 0),
    (full_rooms, LOOSE_FILES, 1),
    (full_rooms, dict(list(FULL_ROOM.items())[1:]) | dict(list(LOOSE_FILES.items())[1:]), 0),
    (arrows_between_rooms, ARROWS, 0),
    (repeated_lines, {"a.py": distinct("a", 24), "b.py": distinct("a", 24)}, 0),
    (repeated_lines, {"a.py": SHARED + distinct("a", 24), "b.py": SHARED + distinct("b", 24)}, 0),
    (repeated_lines, {"a.py": distinct("a", 25) + "(\n)\n" * 9, "b.py": distinct("b", 25) + "(\n)\n" * 9}, 0),
    (repeated_lines, {"a.py": distinct("a", 25), "b.py": f'"""\n{distinct("a", 25)}"""\n{distinct("b", 25)}'}, 0),
]


def offenders(files: dict[str, str]) -> list[Source]:
    """Invented files of the package."""
    return [parse(f"{PACKAGE}/{path}", text) for path, text in files.items()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_follows_the_rule(rule):
    folders, _ = RULES[rule]
    sources = read_sources(*folders)
    assert sources
    complaints = list(rule(sources))
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_its_offender(rule):
    _, files = RULES[rule]
    (complaint,) = rule(offenders(files))
    assert complaint.startswith(tuple(f"{PACKAGE}/{path}:" for path in files))


@pytest.mark.parametrize(("rule", "files", "count"), MORE_OFFENDERS, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_finds_as_many_offenders_as_there_are(rule, files, count):
    assert len(list(rule(offenders(files)))) == count


def test_every_room_says_what_belongs_in_it_and_has_its_line_where_things_are():
    rooms = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    loose = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert rooms | loose == set(floors.FLOOR_OF), "FLOORS and the package name other rooms"
    table = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where things are")[2].partition("\n## ")[0]
    )
    told = re.findall(r"^\| (\d+) \|(.*?)\|", table, re.MULTILINE)
    shown = {int(floor): set(re.findall(r"`(\w+)(?:/|\.py)`", names)) for floor, names in told}
    assert shown == {number: set(names) - {"__init__"} for number, names in enumerate(FLOORS)}


def test_the_unit_tests_have_the_rooms_of_what_they_test():
    folders = {
        path.relative_to(ROOT / "tests" / "unit").parts[0] for path in (ROOT / "tests" / "unit").rglob("test_*.py")
    }
    assert folders <= {*floors.FLOOR_OF, "tools"}
