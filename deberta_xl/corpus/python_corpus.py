"""A small English corpus that every Python brings along: its language reference and the standard library's docstrings.

About 2 MB of prose by many hands. Modules are parsed, never imported.
"""

from __future__ import annotations

import ast
import itertools
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from deberta_xl.base.errors import CorpusError

#: Folders of the standard library that are left out: tests, generated code, and what is not part of it.
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
#: Characters after which a document ends at the next paragraph, so that held-out documents can be drawn evenly.
DOCUMENT_LENGTH = 4000


def python_corpus() -> Iterator[dict[str, str]]:
    """The documents, `{"text", "source"}` each, without repetitions, in a fixed order for a given Python."""
    seen: set[str] = set()
    for source, texts in itertools.chain(reference_topics(), library_docstrings()):
        fresh = [text for text in texts if text not in seen and not seen.add(text)]
        for number, document in enumerate(cut("\n\n".join(fresh)), start=1):
            yield {"text": document, "source": f"{source}#{number}"}


def reference_topics() -> Iterator[tuple[str, list[str]]]:
    """The chapters of the language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            "this Python lacks pydoc_data.topics (a minimal installation?); give a corpus of your own instead"
        ) from None
    for name in sorted(topics):
        yield f"pydoc_data.topics/{name}", [topics[name].strip()]


def library_docstrings() -> Iterator[tuple[str, list[str]]]:
    """The docstrings of each module of the standard library, in the order of its source."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not SKIPPED & set(relative.parts):
            yield relative.as_posix(), docstrings(path.read_bytes())


def docstrings(source: bytes) -> list[str]:
    """All docstrings of a module in the order of its source; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [text for node in documented_nodes(tree) if (text := ast.get_docstring(node))]


def documented_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The module, classes and functions at and below a node; only statements are descended into."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from documented_nodes(child)


def cut(text: str) -> Iterable[str]:
    """Documents of about DOCUMENT_LENGTH characters, cut between paragraphs."""
    paragraphs: list[str] = []
    for paragraph in text.split("\n\n"):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= DOCUMENT_LENGTH:
            yield "\n\n".join(paragraphs)
            paragraphs = []
    if any(p.strip() for p in paragraphs):
        yield "\n\n".join(paragraphs)
