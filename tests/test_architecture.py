"""The shape of the source: who imports whom, what is documented, what is never written.

Files are parsed, not imported. Each rule is a function from parsed files to complaints (file:line, what is wrong, what
to do). One test applies it to the repository, another to a small offender that it has to find.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "deberta_xl"
MAX_LINES = 300


class Source(NamedTuple):
    """A parsed file."""

    path: str
    """Relative to the repository, with forward slashes."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def is_package_file(self) -> bool:
        """Whether it is part of the package (and not a tool or a test)."""
        return self.path.startswith(f"{PACKAGE}/")


class Floor(NamedTuple):
    """A level of the house: importing goes down, or along the same floor."""

    level: int
    name: str


FLOORS = {
    "architecture": Floor(0, "0"),
    "child_process": Floor(0, "0"),
    "command_line": Floor(0, "0"),
    "config": Floor(0, "0"),
    "config_file": Floor(0, "0"),
    "deepspeed_config": Floor(0, "0"),
    "deepspeed_json": Floor(0, "0"),
    "deepspeed_refused": Floor(0, "0"),
    "deepspeed_schema": Floor(0, "0"),
    "durable": Floor(0, "0"),
    "durations": Floor(0, "0"),
    "errors": Floor(0, "0"),
    "finetune_config": Floor(0, "0"),
    "interruption": Floor(0, "0"),
    "launch": Floor(0, "0"),
    "log": Floor(0, "0"),
    "output_file": Floor(0, "0"),
    "rendezvous": Floor(0, "0"),
    "settings_file": Floor(0, "0"),
    "settings_reference": Floor(0, "0"),
    "signs": Floor(0, "0"),
    "small_file": Floor(0, "0"),
    "stop_request": Floor(0, "0"),
    "strict": Floor(0, "0"),
    "kernels": Floor(1, "1a"),
    "model": Floor(1, "1a"),
    "data": Floor(1, "1b"),
    "parallel": Floor(2, "2"),
    "checkpoint": Floor(3, "3a"),
    "planning": Floor(3, "3b"),
    "objectives": Floor(4, "4"),
    "training": Floor(5, "5"),
    "__init__": Floor(6, "top"),
    "__main__": Floor(6, "top"),
    "commands": Floor(6, "top"),
    "pretrained": Floor(6, "top"),
    "pretrain": Floor(6, "top"),
    "finetune": Floor(6, "top"),
    "finetuned": Floor(6, "top"),
    "task_predict": Floor(6, "top"),
    "fill_mask": Floor(6, "top"),
}

FORBIDDEN_IMPORTS = {
    "0": ("torch", "deepspeed", "megatron", "numpy"),
    "1a": ("torch.distributed", "deepspeed", "megatron", "mpi4py"),
    "1b": ("torch", "deepspeed", "megatron"),
    "3b": ("torch", "deepspeed", "megatron"),
}
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def parse(path: str, text: str) -> Source:
    """A file from its text."""
    return Source(path, text, ast.parse(text, filename=path))


@functools.cache
def read_source(path: Path) -> Source:
    """A file of the repository, parsed once for all rules."""
    return parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def read_sources(*folders: str) -> list[Source]:
    """All Python files below these folders of the repository."""
    return [read_source(path) for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def floor_of(module: str) -> Floor | None:
    """The floor of a module of the package, None when it has been given none."""
    parts = module.split(".")
    return FLOORS.get(parts[1] if len(parts) > 1 else "__init__")


# What a file imports.


class Import(NamedTuple):
    """One imported module."""

    module: str
    line: int


def imports_of(source: Source, nodes: Iterable[ast.AST], known: set[str]) -> Iterator[Import]:
    """Modules imported by the statements among `nodes`; `from a import b` is a.b where that is a module in `known`."""
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full in known or not base.startswith(PACKAGE)
                yield Import(full if is_module else base, node.lineno)


def statements_at_import(nodes: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those in functions, nor under `if TYPE_CHECKING`."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements_at_import(node.orelse)
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            yield from statements_at_import(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from statements_at_import(handler.body)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, else the empty string."""
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def lies_in(module: str, package: str) -> bool:
    """Whether `module` is `package` or inside it."""
    return module == package or module.startswith(f"{package}.")


# The rules.


def imports_that_go_up(sources: list[Source]) -> Iterator[str]:
    """Imports from a higher floor, or from the neighbouring room of floor 1."""
    known = {source.module for source in sources}
    for source in filter(lambda source: source.is_package_file, sources):
        own = floor_of(source.module)
        if own is None:
            yield f"{source.path}:1: has no floor; put it into a folder that has one, or give it one in FLOORS"
            continue
        for imported in imports_of(source, ast.walk(source.tree), known):
            other = floor_of(imported.module) if lies_in(imported.module, PACKAGE) else None
            if other and (other.level > own.level or (other.level == own.level and other != own)):
                yield (
                    f"{source.path}:{imported.line}: floor {own.name} imports {imported.module} of floor {other.name}; "
                    "move what both need down, or pass it in as an argument"
                )


def forbidden_libraries(sources: list[Source]) -> Iterator[str]:
    """Libraries that a floor does not know, imported anywhere in it or reached by attributes (torch.distributed)."""
    known = {source.module for source in sources}
    for source in filter(lambda source: source.is_package_file, sources):
        own = floor_of(source.module)
        libraries = FORBIDDEN_IMPORTS.get(own.name, ()) if own else ()
        used = {(i.line, i.module) for i in imports_of(source, ast.walk(source.tree), known)}
        used |= {(n.lineno, dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)}
        for library in libraries:
            for line in sorted({line for line, module in used if lies_in(module, library)}):
                yield f"{source.path}:{line}: floor {own.name} knows no {library}; move this to a higher floor"


def circles(sources: list[Source]) -> Iterator[str]:
    """Modules that need each other while being imported."""
    known = {source.module for source in sources}
    graph = {s.module: list(imports_of(s, statements_at_import(s.tree.body), known)) for s in sources}
    paths = {source.module: source.path for source in sources}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        for imported in graph[module]:
            if imported.module in trail:
                circle = [*trail[trail.index(imported.module) :], imported.module]
                yield f"{paths[module]}:{imported.line}: import circle {' -> '.join(circle)}; move what both need down"
            elif imported.module in graph and imported.module not in done:
                yield from visit(imported.module, (*trail, imported.module))
        done.add(module)

    for module in graph:
        if module not in done:
            yield from visit(module, (module,))


def unsafe_loads(sources: list[Source]) -> Iterator[str]:
    """`torch.load` without weights_only=True and `np.load` without allow_pickle=False: either may run foreign code."""
    required = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    required["numpy.load"] = required["np.load"]
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and (name := dotted(node.func)) in required:
                keyword, value = required[name]
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                if given.get(keyword) is not value:
                    yield f"{source.path}:{node.lineno}: {name} without {keyword}={value}; say it"
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
                loads = [alias.name for alias in node.names if alias.name == "load"]
                yield from (f"{source.path}:{node.lineno}: imports {n} by name; write {node.module}.{n}" for n in loads)


def pickles(sources: list[Source]) -> Iterator[str]:
    """Modules that read or write objects as code."""
    for source in sources:
        for imported in imports_of(source, ast.walk(source.tree), set()):
            if any(lies_in(imported.module, name) for name in PICKLES):
                yield f"{source.path}:{imported.line}: imports {imported.module}; use safetensors or JSON"


def prints(sources: list[Source]) -> Iterator[str]:
    """`print` in the package."""
    for source in filter(lambda source: source.is_package_file, sources):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and dotted(node.func) == "print":
                yield f"{source.path}:{node.lineno}: print; log through deberta_xl/log.py"


def missing_docstrings(sources: list[Source]) -> Iterator[str]:
    """Public modules, classes, functions and methods that say nothing of themselves."""
    for source in sources:
        for name, node in public_definitions(source.tree, source.module):
            if not ast.get_docstring(node):
                line = getattr(node, "lineno", 1)
                yield f"{source.path}:{line}: {name} has no docstring; say what it adds: shapes, units, errors"


def public_definitions(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, ast.AST]]:
    """A module or class with everything public that is defined in it."""
    yield name, node
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from public_definitions(child, f"{name}.{child.name}")
        else:
            yield f"{name}.{child.name}", child


def missing_types(sources: list[Source]) -> Iterator[str]:
    """Functions of the package whose parameters or result have no type."""
    for source in filter(lambda source: source.is_package_file, sources):
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            a = node.args
            parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bare = [p.arg for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
            bare += ["the result"] if node.returns is None and node.name != "__init__" else []
            if bare:
                yield f"{source.path}:{node.lineno}: {node.name}: no type for {', '.join(bare)}; write it"


def long_files(sources: list[Source]) -> Iterator[str]:
    """Files of the package that outgrew a few pages."""
    for source in filter(lambda source: source.is_package_file, sources):
        lines = source.text.count("\n")
        if lines > MAX_LINES:
            yield f"{source.path}:{lines}: {lines} lines, more than {MAX_LINES}; look for the noun hiding in it"


# Each rule with the folders it holds for, and an offender that it must find.

RULES = {
    imports_that_go_up: ([PACKAGE], {"model/a.py": "def f():\n    import deberta_xl.training.loop"}),
    forbidden_libraries: ([PACKAGE], {"data/a.py": "def f():\n    import torch"}),
    circles: ([PACKAGE], {"model/a.py": "from deberta_xl.model import b", "model/b.py": "import deberta_xl.model.a"}),
    unsafe_loads: ([PACKAGE, "tools", "tests"], {"a.py": "import torch\ntorch.load('x')"}),
    pickles: ([PACKAGE, "tools"], {"a.py": "from pickle import loads"}),
    prints: ([PACKAGE], {"a.py": "print(1)"}),
    missing_docstrings: ([PACKAGE, "tools"], {"a.py": '"""A."""\n\n\nclass B:\n    """B."""\n\n    def c(self): ...'}),
    missing_types: ([PACKAGE], {"a.py": "def f(x) -> int: ..."}),
    long_files: ([PACKAGE], {"a.py": "x = 1\n" * (MAX_LINES + 1)}),
}

MORE_OFFENDERS = [
    (imports_that_go_up, {"kernels/a.py": "from deberta_xl.data import b", "data/b.py": ""}, 1),
    (imports_that_go_up, {"data/a.py": "from ..kernels.b import c"}, 1),
    (imports_that_go_up, {"data/a.py": "from .. import pretrain", "pretrain.py": ""}, 1),
    (imports_that_go_up, {"config.py": "from deberta_xl import DebertaForMaskedLM"}, 1),
    (imports_that_go_up, {"helpers.py": "", "utilities/a.py": ""}, 2),
    (imports_that_go_up, {"model/a.py": "from deberta_xl.kernels.b import c\nfrom deberta_xl.config import d"}, 0),
    (imports_that_go_up, {"pretrain.py": "from deberta_xl.training.loop import train"}, 0),
    (forbidden_libraries, {"model/a.py": "import torch\nx = torch.distributed.get_rank()"}, 1),
    (forbidden_libraries, {"model/a.py": "from torch import distributed"}, 1),
    (forbidden_libraries, {"kernels/a.py": "from megatron.core import tensor_parallel"}, 1),
    (forbidden_libraries, {"config.py": "from torch import nn"}, 1),
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


def test_the_package_never_uses_what_stands_outside():
    sources = read_sources(PACKAGE)
    outside = ("tools", "tests", "slurm")
    found = [
        f"{source.path}:{imported.line}: imports {imported.module}; the package stands without tools and tests"
        for source in sources
        for imported in imports_of(source, ast.walk(source.tree), set())
        if any(lies_in(imported.module, name) for name in outside)
    ]
    assert not found, "\n" + "\n".join(found)
