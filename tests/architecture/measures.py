"""How large a thing may be, and how much of it may stand twice."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from architecture.sources import PACKAGE, Source, code_lines, imports_of, room_of

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 300
MAX_FILES_IN_A_ROOM = 18
MAX_LOOSE_FILES = 3
MAX_PAIRS_OF_ROOMS = 110
MAX_SHARED = 0.2
MIN_LINES_TO_SHARE = 25
ROOM_TO_ROOM = "the package, tools and benchmarks"
SAYS_NOTHING = re.compile(
    r"\W*|(?:else|try|finally|return|pass|break|continue|raise|self)\W*"  # brackets, or a keyword alone
    r"|@\w+|def forward\(|\) -> [^()]+:"  # what opens and closes a definition
    r"|(?:def |super\(\)\.)__(?:post_)?init__\(.*"
)
"""Lines that the language asks for, the same in every class."""


def long_functions(sources: list[Source]) -> Iterator[str]:
    """Functions that outgrew a page."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield (
                        f"{source.path}:{node.lineno}: {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}; "
                        "look for the noun hiding in it"
                    )


def long_files(sources: list[Source]) -> Iterator[str]:
    """Files that outgrew a few pages."""
    for source in sources:
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{source.path}:{lines}: {lines} lines, more than {MAX_FILE_LINES}; look for the noun hiding in it"


def full_rooms(sources: list[Source]) -> Iterator[str]:
    """Folders of the package in which nobody finds anything, and files that lie beside them."""
    folders = defaultdict(list)
    for source in filter(lambda source: source.is_package_file, sources):
        folders[source.path.rpartition("/")[0]].append(source.path)
    for folder, paths in folders.items():
        limit = MAX_LOOSE_FILES if folder == PACKAGE else MAX_FILES_IN_A_ROOM
        if len(paths) > limit:
            yield f"{paths[-1]}:1: {folder} has {len(paths)} files, more than {limit}; find the rooms in it"


def arrows_between_rooms(sources: list[Source]) -> Iterator[str]:
    """More pairs of rooms than a reader can keep apart of which one imports the other."""
    known = {source.module for source in sources}
    arrows = defaultdict(list)
    for source in sources:
        for imported in imports_of(source, ast.walk(source.tree), known):
            pair = room_of(source.module), room_of(imported.module)
            if imported.module in known and pair[0] != pair[1]:
                arrows[pair].append(f"{source.path}:{imported.line}")
    if len(arrows) > MAX_PAIRS_OF_ROOMS:
        (room, other), places = min(arrows.items(), key=lambda item: len(item[1]))
        yield (
            f"{places[0]}: {len(arrows)} pairs of rooms of which one imports the other, more than "
            f"{MAX_PAIRS_OF_ROOMS}; begin here, where {room} imports {other} {len(places)} times in all"
        )


def repeated_lines(sources: list[Source]) -> Iterator[str]:
    """Files that share too much of the shorter one's code, letter for letter: a noun that nobody has named yet."""
    lines = {source.path: telling_lines(source) for source in sources}
    long = {path: found for path, found in lines.items() if found.total() >= MIN_LINES_TO_SHARE}
    for (path, own), (other, theirs) in itertools.combinations(long.items(), 2):
        shared = own & theirs
        share = shared.total() / min(own.total(), theirs.total())
        if share > MAX_SHARED:
            example = max(shared, key=len)
            yield (
                f"{path}:1: shares {share:.0%} of the shorter one's code lines with {other}, as {example!r}; "
                "give what both say a name and one home"
            )


def telling_lines(source: Source) -> Counter[str]:
    """Its lines of code that say something, with how often they stand there."""
    return Counter(line for line in code_lines(source) if not SAYS_NOTHING.fullmatch(line))
