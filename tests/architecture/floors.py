"""Who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from architecture.sources import (
    PACKAGE,
    Source,
    dotted,
    imports_of,
    lies_in,
    room_of,
    statements_at_import,
)

FLOORS = (
    ("base",),
    ("settings",),
    ("kernels", "data"),
    ("model", "corpus", "tasks", "run"),
    ("parallel",),
    ("checkpoint", "planning"),
    ("weights",),
    ("objectives", "conversion"),
    ("training", "public"),
    ("commands",),
    ("__init__", "pretrain", "finetune"),
)
"""The rooms from the ground up. A room imports from those below it, never from its neighbours."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

NO_TORCH = ("torch", "deepspeed", "megatron")
NO_RANKS = ("torch.distributed", "deepspeed", "megatron", "mpi4py")
FORBIDDEN = {
    "base": (*NO_TORCH, "numpy"),
    "settings": (*NO_TORCH, "numpy"),
    "data": NO_TORCH,
    "corpus": NO_TORCH,
    "tasks": NO_TORCH,
    "planning": NO_TORCH,
    "kernels": NO_RANKS,
    "model": NO_RANKS,
}
"""Libraries that a room does not know."""


def imports_that_go_up(sources: list[Source]) -> Iterator[str]:
    """Imports from a room above, or from a neighbour on the same floor."""
    known = {source.module for source in sources}
    for source in filter(lambda source: source.is_package_file, sources):
        own = room_of(source.module)
        if own not in FLOOR_OF:
            yield f"{source.path}:1: {own} has no floor; put it into a room that has one, or give it one in FLOORS"
            continue
        for imported in imports_of(source, ast.walk(source.tree), known):
            other = room_of(imported.module)
            if lies_in(imported.module, PACKAGE) and other != own and FLOOR_OF.get(other, 0) >= FLOOR_OF[own]:
                yield (
                    f"{source.path}:{imported.line}: {own} (floor {FLOOR_OF[own]}) imports {imported.module} "
                    f"(floor {FLOOR_OF[other]}); move what both need down, or pass it in as an argument"
                )


def forbidden_libraries(sources: list[Source]) -> Iterator[str]:
    """Libraries that a room does not know, imported anywhere in it or reached by attributes (torch.distributed)."""
    known = {source.module for source in sources}
    for source in filter(lambda source: source.is_package_file, sources):
        own = room_of(source.module)
        used = {(i.line, i.module) for i in imports_of(source, ast.walk(source.tree), known)}
        used |= {(n.lineno, dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)}
        for library in FORBIDDEN.get(own, ()):
            for line in sorted({line for line, module in used if lies_in(module, library)}):
                yield f"{source.path}:{line}: {own} knows no {library}; move this to a room above"


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


def imports_from_outside(sources: list[Source]) -> Iterator[str]:
    """Imports of what stands beside the package: it stands without tools and tests."""
    for source in filter(lambda source: source.is_package_file, sources):
        for imported in imports_of(source, ast.walk(source.tree), set()):
            if any(lies_in(imported.module, name) for name in ("tools", "tests", "slurm", "benchmarks")):
                yield f"{source.path}:{imported.line}: imports {imported.module}; the package stands without it"
