"""Reading a JSON of settings strictly, with a place for each complaint; what it says is for others to check."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.files import read_settings


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a strict JSON file: no comments, trailing commas, NaN or duplicate keys."""
    try:
        text = read_settings(path, "JSON")
        tree = json.loads(text, object_pairs_hook=unique_keys(path, text), parse_constant=refuse_constant(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{place}: {explain_syntax(error)}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # Python's limits, on digits of a number too
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no JSON object but {type(tree).__name__}; it must look like {{...}}")
    return tree


def unique_keys(path: Path, text: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A hook for `json.loads` that refuses an object with the same key twice."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        for key in names:
            if names.count(key) > 1:
                pattern = re.compile(rf'"{re.escape(key)}"\s*:')
                lines = [str(text.count("\n", 0, match.start()) + 1) for match in pattern.finditer(text)]
                raise ConfigError(f"{path}: key {key!r} is written twice in one object (lines {', '.join(lines)})")
        return dict(pairs)

    return build


def refuse_constant(path: Path) -> Callable[[str], None]:
    """A hook for `json.loads` that refuses NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ConfigError(f"{path}: {name} is not a number of JSON")

    return refuse


def explain_syntax(error: json.JSONDecodeError) -> str:
    """A syntax error in words: the usual suspects are comments and trailing commas."""
    if not error.doc.strip():
        return "the file is empty; the smallest valid one is " + '{"zero_optimization": {"stage": 1}}'
    rest = error.doc[error.pos :].lstrip()
    if rest.startswith(("//", "#", "/*")):
        return "JSON has no comments; remove it"
    before = error.doc[: error.pos].rstrip()
    if (before.endswith(",") and rest.startswith(("}", "]"))) or "trailing comma" in error.msg:
        return "a comma before the closing bracket; remove it"
    return f"not valid JSON: {error.msg}"
