"""What is always written, and what never."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from architecture.sources import Source, dotted, imports_of, lies_in

PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


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
                yield f"{source.path}:{node.lineno}: print; log through deberta_xl/base/log.py"


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
