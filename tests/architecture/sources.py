"""Parsed files of the repository: what they import, and which of their lines are code."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = "deberta_xl"


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


def parse(path: str, text: str) -> Source:
    """A file from its text."""
    return Source(path, text, ast.parse(text, filename=path))


def read_sources(*folders: str) -> list[Source]:
    """All Python files below these folders of the repository."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def room_of(module: str) -> str:
    """The room that a module lies in: a folder of the package, a loose module of it, or a folder beside it."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


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


def code_lines(source: Source) -> list[str]:
    """Its lines of code without indentation: no comments, docstrings, imports, blank lines."""
    without = set()
    for node in ast.walk(source.tree):
        said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if said or isinstance(node, ast.Import | ast.ImportFrom):
            without.update(range(node.lineno, node.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    code = {n for token in tokens if token.type not in silent for n in range(token.start[0], token.end[0] + 1)}
    lines = source.text.splitlines()
    return [line for number in sorted(code - without) if (line := lines[number - 1].strip())]
