"""What every setting is called, holds and means, read from the configuration itself: types, defaults, checks, and the
sentence under each field. `--help SECTION` shows it, and docs/settings.md is written from it (tools/settings.py).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import UserPath
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import SHORTHANDS, accepts_none, members, nearest, section_types, toml_value
from deberta_xl.settings.pretraining import RunConfig

TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
#: What a check says of a value far too small -> what is allowed.
BOUNDS = (
    (r"must be at least (\S+?)[;,.]?$", r"at least \1"),
    (r"must be greater than 0", "above 0"),
    (r"allowed: 0 <= \w+ < 1", "0 … 1, 1 excluded"),
    (r"allowed: 0 … 1, 1 excluded", "0 … 1, 1 excluded"),
    (r"must lie in 0 … 1, 0 excluded", "0 … 1, 0 excluded"),
    (r"is not a share between 0 and 1", "0 … 1"),
    (r"must be shares whose sum is at most 1", "0 … 1, together at most 1"),
)
PREAMBLE = """\
# Settings

Every key of a run's configuration: in a TOML file (`[train]`, then `steps = 500`; `--config FILE.toml`), or on the
command line (`train.steps=500`), where `none` unsets a key. The presets (`deberta_xl/configs/*.toml`) set some of them.
`--print-config` shows all as they are in force, as TOML that `--config` reads; `--help SECTION` shows a part of this
page in the terminal. What DeepSpeed is told beside them is in [deepspeed_configs](../deepspeed_configs/README.md).

This page is written by `python tools/settings.py --output docs/settings.md`; do not edit it.
"""


class Setting(NamedTuple):
    """One key."""

    key: str
    kind: str
    """Its type in words."""
    default: str
    """As TOML writes it."""
    allowed: str
    """The values, where its type alone does not say."""
    meaning: str


def settings_of(section: type) -> list[Setting]:
    """The keys of a section, in their order."""
    types, meanings = typing.get_type_hints(section, include_extras=True), field_meanings(section)
    return [
        Setting(
            field.name,
            kind_of(types[field.name]),
            "unset" if field.default in (None, dataclasses.MISSING) else toml_value(field.default),
            allowed_values(section, field.name, types[field.name]),
            meanings[field.name],
        )
        for field in dataclasses.fields(section)
    ]


def kind_of(annotation: Any) -> str:
    """A type in words."""
    kinds = []
    for member in members(annotation):
        if member == UserPath:
            kinds.append("path")
        elif typing.get_origin(member) is Literal:
            kinds.append("text")
        elif member is not type(None):
            kinds.append(TYPES[member])
    return " or ".join([*kinds, *(["none"] if accepts_none(annotation) else [])])


def allowed_values(section: type, key: str, annotation: Any) -> str:
    """The words to choose from, or the bounds that the section's own check names."""
    for member in members(annotation):
        if typing.get_origin(member) is Literal:
            return ", ".join(map(str, typing.get_args(member)))
    if bool in members(annotation) or not {int, float} & set(members(annotation)):
        return ""
    try:
        section(**{key: -1 if int in members(annotation) else -1.0})
    except ConfigError as error:
        for pattern, words in BOUNDS:
            if f"{key}=" in str(error) and (match := re.search(pattern, str(error))):
                return match.expand(words)
    return ""


def field_meanings(section: type) -> dict[str, str]:
    """Field -> the sentence under it; the most derived class that has the field speaks."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        found |= dict(documented_fields(cls.__module__, cls.__name__))
    return found


def documented_fields(module: str, name: str) -> Iterator[tuple[str, str]]:
    """The fields of a class, with the string under each."""
    body = next(node.body for node in classes_of(module) if node.name == name)
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            yield field.target.id, " ".join(str(below.value.value).split()) if is_text else ""


@functools.cache
def classes_of(module: str) -> list[ast.ClassDef]:
    """The classes that a module defines."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def title_of(section: type) -> str:
    """What a section is about: the first sentence of its docstring, without its name."""
    return " ".join(inspect.getdoc(section).split("\n\n")[0].split()).partition(": ")[2]


# As Markdown.


def as_markdown() -> str:
    """docs/settings.md."""
    parts = [PREAMBLE]
    for title, root in (("Pretraining", RunConfig), ("Fine-tuning", FinetuneConfig)):
        parts.append(f"## {title}\n")
        for name, section in section_types(root).items():
            parts.append(f"### `{name}`\n\n{capitalized(title_of(section))}\n")
            if root is FinetuneConfig and section_types(RunConfig).get(name) is section:
                parts.append("The keys are those of pretraining.\n")
                continue
            parts.append(table_of(name, section))
    return "\n".join(parts)


def capitalized(sentence: str) -> str:
    """A sentence with a capital at its beginning."""
    return sentence[:1].upper() + sentence[1:]


def table_of(name: str, section: type) -> str:
    """A section's keys as a table, and the shorthands that go with them."""
    lines = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for setting in settings_of(section):
        default = setting.default if setting.default == "unset" else f"`{setting.default}`"
        cells = (f"`{setting.key}`", setting.kind, default, setting.allowed, setting.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for (owner, shorthand), keys in SHORTHANDS.items():
        if owner == name:
            lines += ["", f"`{name}.{shorthand}` sets {' and '.join(f'`{key}`' for key in keys)}."]
    return "\n".join(lines) + "\n"


# In the terminal.


def as_text(topic: str, root: type) -> str:
    """The help on a section, a key (`train.steps`) or `all`. Raises ConfigError for what is none of them."""
    sections = section_types(root)
    name, _, key = topic.partition(".")
    if topic != "all" and name not in sections:
        raise ConfigError(f"no section {topic!r}; {nearest(name, [*sections, 'all'])}")
    parts = []
    for section_name in sections if topic == "all" else [name]:
        settings = settings_of(sections[section_name])
        if key and key not in (known := [setting.key for setting in settings]):
            raise ConfigError(f"no key {topic!r}; {nearest(key, known)}")
        parts.append(f"[{section_name}]  {title_of(sections[section_name])}\n")
        parts += [describe(setting) for setting in settings if key in ("", setting.key)]
    return "\n".join(parts)


def describe(setting: Setting) -> str:
    """A key in the terminal: name and default, type, and the meaning wrapped below."""
    facts = ", ".join(filter(None, (setting.kind, setting.allowed)))
    width = max(40, min(120, shutil.get_terminal_size().columns)) - 1
    indent = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
    lines = textwrap.wrap(f"{setting.meaning} ({facts})", width, **indent)
    return "\n".join([f"  {setting.key} = {setting.default}", *lines]) + "\n"


class Help(argparse.Action):
    """`--help`, and `--help SECTION` with the settings of `root`."""

    def __init__(self, *, root: type, **options: Any):
        super().__init__(nargs="?", **options)
        self.root = root

    def __call__(self, parser: argparse.ArgumentParser, _namespace: Any, topic: Any, _option: Any = None) -> None:
        if topic is None:
            parser.print_help()
        else:
            try:
                sys.stdout.write(as_text(topic, self.root))
            except ConfigError as error:
                parser.error(f"--help: {error}")
        parser.exit()
