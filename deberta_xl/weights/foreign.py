"""Folders, and single files, in the original release's or Hugging Face's layout, read safely."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.lazy import LazyTensors
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.tensor_files import WEIGHT_FILES, find_weight_file, open_tensors
from deberta_xl.data.tokenizer_files import TOKENIZER_FILES
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.dialect import needs_generator, read_dialect
from deberta_xl.weights.foreign_config import from_foreign_config
from deberta_xl.weights.foreign_fields import LEARNT, other_fields
from deberta_xl.weights.native_config import MODEL_TYPE, Learnt, explain
from deberta_xl.weights.pair import no_generator, split_part
from deberta_xl.weights.pretrained_folder import Origin, Pretrained, complete

CONFIG_NAMES = ("config.json", "model_config.json")
GENERATOR_CONFIG_NAMES = ("generator_config.json", *CONFIG_NAMES)
GENERATOR_NAME = "pytorch_model.generator.bin"
"""Where the released v3 folders keep the generator, with `generator_config.json`."""
LONGEST_STATED = 10**6
FOREIGN_TYPES = (None, "deberta", "deberta-v2")


def read_config_fields(folder: Path, names: tuple[str, ...] = CONFIG_NAMES) -> dict[str, Any] | None:
    """The fields of a folder's configuration, of the generator's where that is named; None when it has none."""
    folder, part = split_part(folder)
    if part == "generator" and (folder / GENERATOR_NAME).is_file():
        names = GENERATOR_CONFIG_NAMES
    for name in names:
        if (folder / name).is_file():
            try:
                fields = read_json(folder / name)
            except ValueError as error:
                raise CheckpointError(f"{folder / name} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise CheckpointError(f"{folder / name} holds no JSON object")
            return fields
    return None


def is_foreign_folder(folder: Path) -> bool:
    """Whether a folder's configuration is the original release's or Hugging Face's, rather than ours or none.

    Raises CheckpointError when it is that of another kind of model.
    """
    fields = read_config_fields(folder)
    model_type = MODEL_TYPE if fields is None else fields.get("model_type")
    if model_type != MODEL_TYPE and model_type not in FOREIGN_TYPES:
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}, which is not a DeBERTa")
    return model_type in FOREIGN_TYPES


def stated_length(folder: Path) -> int | None:
    """The longest sequence that the tokenizer beside a model lets pass; None where it does not say."""
    path = folder / "tokenizer_config.json"
    fields = read_config_fields(folder, (path.name,)) or {}
    length = fields.get("model_max_length")
    # transformers writes 10^30 for "any".
    return length if isinstance(length, int) and 0 < length <= LONGEST_STATED else None


def parse_config(fields: dict[str, Any], path: Path) -> DebertaConfig:
    """The architecture of a foreign configuration. Raises CheckpointError when it is none that we have."""
    try:
        return from_foreign_config(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a DeBERTa that can be loaded: {explain(error)}") from error


def open_foreign(source: Path, *, generator: Path | None = None, may_be_fresh: bool = False) -> Pretrained:
    """The model of a foreign folder, or of one file of weights in it; nothing is read yet but names and shapes.

    `generator` is the file, or folder, of the generator whose tables a v3 discriminator adds to; by default the one
    beside it. `may_be_fresh` lets absolute positions and the masked-LM head be absent.

    Raises CheckpointError when files are missing or damaged, or tensors do not fit the configuration.
    """
    folder, weights = find_foreign(source)
    names = GENERATOR_CONFIG_NAMES if "generator" in weights.name else CONFIG_NAMES
    fields = read_config_fields(folder, names)
    if fields is None:
        raise CheckpointError(f"{folder} has no {' or '.join(names)}: the weights' architecture is not known")
    config = parse_config(fields, source)
    stored = open_tensors(weights)
    partner = open_generator(folder, generator) if needs_generator(stored) else None
    tensors, dialect = read_dialect(stored, config, weights, partner)
    try:
        tensors, fresh = complete(tensors, config, source, may_be_fresh=may_be_fresh)
    except CheckpointError as error:
        if (folder / names[0]).is_file() or names is not GENERATOR_CONFIG_NAMES:
            raise
        raise CheckpointError(
            f"{error}; there is no {folder / names[0]}, so the discriminator's configuration was taken for it: copy "
            "the generator's own there"
        ) from error
    kind = "huggingface" if fields.get("model_type") else "microsoft"
    origin = Origin(source=source.name, kind=kind, dialect=dialect, fields=other_fields(fields), fresh=fresh)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return Pretrained(
        folder=folder,
        kind=kind,
        config=config,
        tensors=tensors,
        tokenizer=folder if has_tokenizer else None,
        origin=origin,
        fresh=fresh,
        learnt=stated_learnt(fields, source),
    )


def stated_learnt(fields: Mapping[str, Any], path: Path) -> Learnt:
    """How a model was trained, by what rides along in a foreign configuration."""
    try:
        return Learnt.checked(*(fields.get(LEARNT[ours]) for ours in Learnt._fields))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_foreign(source: Path) -> tuple[Path, Path]:
    """The folder, and the file of weights in it, that a folder, one model of a pair, or a file stands for."""
    folder, part = split_part(source)
    if part == "generator":
        if not (folder / GENERATOR_NAME).is_file():
            raise CheckpointError(no_generator(folder))
        return folder, folder / GENERATOR_NAME
    return (folder, find_weight_file(folder)) if folder.is_dir() else (folder.parent, folder)


def find_generator(source: Path, given: Path | None) -> Path | None:
    """What `open_foreign` takes for the generator of a discriminator: the one given, or beside it; None for neither.

    Raises CheckpointError when what is beside it is half of one.
    """
    if given is not None:
        return given
    beside = source / "generator"
    if (source / GENERATOR_NAME).is_file():
        return beside
    if not beside.is_dir():
        return None
    if read_config_fields(beside) is not None:
        return beside
    if any((beside / name).is_file() for name in WEIGHT_FILES):
        raise CheckpointError(
            f"{beside} has weights, but no {' or '.join(CONFIG_NAMES)}: copy the generator's there, or remove {beside} "
            "to go on without the generator"
        )
    return None


def open_generator(folder: Path, given: Path | None) -> LazyTensors | None:
    """The generator's tensors as its file has them; None when there is no generator."""
    path = find_generator(folder, given)
    return None if path is None else open_tensors(find_foreign(path)[1])
