"""What only people know of a model they publish: licence, languages, datasets; and the card's YAML front matter."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_xl.base.small_file import read_json, read_small
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.weights.pair import split_part

LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
OF_THE_BODY = ("title", "description", "example")
"""Keys that stand in the card's text, not in its front matter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardMetadata:
    """Facts for a model card; the names are the Hub's."""

    title: str | None = None
    description: str | None = None
    example: str | None = None
    """Text of the example that runs."""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise CheckpointError(
                f"--card license={self.license!r} is no identifier of the Hub's: write mit, apache-2.0, cc-by-4.0, …, "
                "or other, with license_name and license_link"
            )
        for language in self.language:
            if not LANGUAGE.fullmatch(language):
                raise CheckpointError(
                    f"--card language={language!r} is no code of a language: write en, ja, de, …, code or multilingual"
                )


LISTS = ("language", "datasets", "tags", "base_model")
KEYS = tuple(field.name for field in dataclasses.fields(CardMetadata))


def read_metadata(given: Sequence[str]) -> CardMetadata:
    """From options: KEY=VALUE, lists separated by commas, or the path of a TOML file with such keys; later ones win.

    Raises CheckpointError naming the key that is not known, or not of its type.
    """
    values: dict[str, Any] = {}
    for option in given:
        name, equals, text = option.partition("=")
        if equals and (name.strip() in KEYS or not option.endswith(".toml")):
            values |= checked({name.strip(): text.strip()}, f"--card {option}")
        else:
            values |= checked(read_toml(Path(option).expanduser()), option)
    return CardMetadata(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file."""
    try:
        return tomllib.loads(read_small(path).decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(
            f"--card {path} cannot be read: {error.strerror}; give KEY=VALUE or the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--card {path} is not valid TOML: {error}") from None


def checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values by their keys, lists as tuples. Raises CheckpointError for what is not known."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in KEYS:
            close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(KEYS)}"
            raise CheckpointError(f"{source}: unknown key {name!r} of a model card; {hint}")
        if name in LISTS:
            value = value.split(",") if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise CheckpointError(f"{source}: {name} is a text or a list of texts, not {value!r}")
            found[name] = tuple(item.strip() for item in value if item.strip())
        elif isinstance(value, str) and value.strip():
            found[name] = value.strip()
        else:
            raise CheckpointError(f"{source}: {name} is a text, not {value!r}")
    return found


def base_model_of(init: str) -> str:
    """The name of the weights that a run began with: that on the Hub where it is recorded, or the folder's."""
    if cached := re.search(r"models--([^/\\]+)--([^/\\]+)", init):
        return f"{cached[1]}/{cached[2]}"
    folder, _ = split_part(Path(init))
    for name, key in (("config.json", "_name_or_path"), ("conversion.json", "source")):
        recorded = read_field(folder / name, key)
        if recorded and (key == "source" or re.fullmatch(r"[\w.-]+/[\w.-]+", recorded)):
            return recorded
    parts = [part for part in folder.parts if not part.startswith("step-") and part not in ("checkpoints", "best", "/")]
    return parts[-1] if parts else init


def read_field(path: Path, key: str) -> str | None:
    """A text in a file of JSON that may be gone by now."""
    try:
        value = read_json(path).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


# The front matter

PLAIN = re.compile(r"[A-Za-z]\w*([-./]\w+)*", re.ASCII)
OTHER_MEANINGS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
"""Words that YAML takes for something else than a text; `no` is a language."""


def front_matter(facts: Mapping[str, str | Sequence[str]]) -> str:
    """YAML between its two lines; what is empty is left out, and a single base model is no list."""
    lines = ["---"]
    for name, value in facts.items():
        if name == "base_model" and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            lines.append(f"{name}: {quoted(value)}")
        elif value:
            lines += [f"{name}:", *(f"- {quoted(item)}" for item in value)]
    return "\n".join([*lines, "---", ""])


def quoted(text: str) -> str:
    """A text as YAML's double-quoted scalar; plain where nothing but a word can be meant."""
    if PLAIN.fullmatch(text) and text.lower() not in OTHER_MEANINGS:
        return text
    return '"' + "".join(escaped(character) for character in text) + '"'


def escaped(character: str) -> str:
    """A character of a double-quoted scalar."""
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
