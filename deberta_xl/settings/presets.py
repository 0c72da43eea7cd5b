"""Reading and writing a run's configuration: a TOML preset plus `section.key=value` overrides.

Imports no torch. Every complaint names the key, the nearest valid one and where it stands.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.files import read_toml
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.pretraining import RunConfig

PRESETS = Path(__file__).parent.parent / "configs"

Config = typing.TypeVar("Config", RunConfig, FinetuneConfig)
"""The tree that a file describes; every function takes its class as `root`."""

#: Written once, set in several places: `model.dropout=0` is short for both kinds of dropout.
SHORTHANDS = {("model", "dropout"): ("hidden_dropout", "attention_dropout")}

#: Keys that were once, and what decides today: a person who writes one has to know.
GONE = {
    ("sift", key): "sift.variant decides it (original or corrected; docs/finetuning.md has what each means)"
    for key in ("entry", "norm", "step_size", "radius", "divergence", "regression")
}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`did you mean …?` for a mistyped name, or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def preset_names(root: type = RunConfig) -> list[str]:
    """Names accepted by `--config` besides paths; those of fine-tuning begin with `finetune`."""
    is_finetuning = root is FinetuneConfig
    return sorted(p.stem for p in PRESETS.glob("*.toml") if p.stem.startswith("finetune") == is_finetuning)


def load_run_config(preset: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """`load_config` for pretraining."""
    return load_config(preset, overrides, RunConfig)


def load_config(preset: str | Path, overrides: typing.Sequence[str], root: type[Config]) -> Config:
    """Read a preset (its name, or the path of a TOML file) and apply `section.key=value` overrides.

    Raises ConfigError naming the key, the nearest valid one and where it stands.
    """
    path = find_preset(str(preset), root)
    return complete_config(read_toml(path), str(path), overrides, root)


def complete_config(tree: dict[str, Any], source: str, overrides: typing.Sequence[str], root: type[Config]) -> Config:
    """The configuration of what `source` has stated and of overrides. Raises ConfigError as `load_config`."""
    check_keys(tree, source, root)
    for override in overrides:
        apply_override(tree, override, root)
    return build_config(tree, source, root)


def find_preset(name: str, root: type = RunConfig) -> Path:
    """The file behind a preset's name or path."""
    path = Path(name).expanduser() if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not os.path.isfile(path):
        raise ConfigError(f"--config {name}: no such preset or file; {nearest(name, preset_names(root))}")
    return path


def model_folder(name: str, root: type = RunConfig) -> Path | None:
    """The folder of a model that `--config` names instead of a preset; presets come first.

    `FOLDER/generator`, which need not be a folder itself, is the generator of the two models in one.
    """
    folder = Path(name).expanduser()
    is_one_of_two = folder.name in ("generator", "discriminator") and folder.parent.is_dir() and os.sep in name
    return folder if name not in preset_names(root) and (folder.is_dir() or is_one_of_two) else None


def section_types(root: type = RunConfig) -> dict[str, type]:
    """Section name -> its dataclass."""
    return typing.get_type_hints(root)


def keys_of(section: str, root: type = RunConfig) -> list[str]:
    """Keys that may be written in `section`, shorthands included."""
    shorthands = [key for owner, key in SHORTHANDS if owner == section]
    return [f.name for f in dataclasses.fields(section_types(root)[section])] + shorthands


def check_keys(tree: dict[str, Any], source: str, root: type = RunConfig) -> None:
    """Refuse unknown sections and keys; expand the shorthands in place."""
    for section, values in tree.items():
        if section not in section_types(root):
            raise ConfigError(f"unknown section {section!r} in {source}; {nearest(section, section_types(root))}")
        if not isinstance(values, dict):
            raise ConfigError(f"{section!r} in {source} is a section of keys, not a value; write {section}.KEY=VALUE")
        for key in values:
            if key not in keys_of(section, root):
                if (section, key) in GONE:
                    raise ConfigError(f"{section}.{key} in {source} is no key any more: {GONE[section, key]}")
                hint = nearest(key, keys_of(section, root)) + elsewhere(key, section, root)
                raise ConfigError(f"unknown key {section}.{key} in {source}; {hint}")
        expand_shorthands(section, values, source)


def elsewhere(key: str, section: str, root: type = RunConfig) -> str:
    """A hint when another section owns `key`."""
    owners = [name for name in section_types(root) if name != section and key in keys_of(name, root)]
    return f" ({key} belongs to {', '.join(owners)})" if owners else ""


def expand_shorthands(section: str, values: dict[str, Any], source: str) -> None:
    """Replace shorthand keys by the keys they stand for."""
    for (owner, shorthand), targets in SHORTHANDS.items():
        if owner == section and shorthand in values:
            if twice := [key for key in targets if key in values]:
                raise ConfigError(
                    f"{source} sets both {section}.{shorthand} and {section}.{twice[0]}; remove one of them"
                )
            value = values.pop(shorthand)
            values.update(dict.fromkeys(targets, value))


def apply_override(tree: dict[str, Any], override: str, root: type = RunConfig) -> None:
    """Apply one `section.key=value` to the tree in place; the value is TOML, or a bare string."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().lstrip("-").partition(".")
    if not (equals and dot):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, for example train.steps=1000")
    source = f"override {override!r}"
    check_keys({section: {key: None}}, source, root)
    value = {key: parse_value(section, key, text.strip(), root)}
    expand_shorthands(section, value, source)
    tree.setdefault(section, {}).update(value)


def parse_value(section: str, key: str, text: str, root: type = RunConfig) -> Any:
    """The value of an override: raw text for text fields, TOML for all others (`none` unsets an optional key)."""
    targets = SHORTHANDS.get((section, key), (key,))
    annotation = typing.get_type_hints(section_types(root)[section])[targets[0]]
    if accepts_none(annotation) and text.lower() in ("none", "null"):
        return None
    if accepts_text(annotation):
        return text.strip("\"'")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return {"true": True, "false": False}.get(text.lower(), text)
    except (ValueError, RecursionError) as error:  # Python's limits, on digits of a number too
        raise ConfigError(f"override {section}.{key}={text[:40]}…: {error}") from None
    return parsed["value"] if len(parsed) == 1 else text


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def accepts_none(annotation: Any) -> bool:
    """Whether a field may be unset."""
    return type(None) in members(annotation)


def accepts_text(annotation: Any) -> bool:
    """Whether a field holds text: then 2024 in `run.folder=2024` is a name."""
    return any(m is str or typing.get_origin(m) is Literal for m in members(annotation))


def build_config(tree: dict[str, Any], source: str, root: type[Config]) -> Config:
    """Type-check the tree section by section and build the frozen configuration."""
    types = section_types(root)
    sections = {name: build_section(types[name], name, tree.get(name, {}), source) for name in types}
    try:
        return root(**sections)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {source} and its overrides)") from None


def build_section(section: type, name: str, values: dict[str, Any], source: str) -> Any:
    """One section from its values; complaints name the section and where they came from."""
    try:
        return section(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error} (from {source} and its overrides)") from None


def to_toml(config: RunConfig | FinetuneConfig) -> str:
    """The configuration as TOML that `load_config` reads back to an equal tree; unset keys are left out."""
    lines: list[str] = []
    for section in section_types(type(config)):
        lines.append(f"[{section}]")
        values = dataclasses.asdict(getattr(config, section))
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A scalar in TOML's spelling."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, too
    return repr(value)
