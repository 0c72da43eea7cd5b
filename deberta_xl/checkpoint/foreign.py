"""Folders in the original release's or Hugging Face's layout: their files, read safely."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deberta_xl.architecture import DebertaConfig
from deberta_xl.checkpoint.foreign_config import from_foreign_config
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.names import from_microsoft
from deberta_xl.checkpoint.native_config import MODEL_TYPE, explain
from deberta_xl.log import logger

CONFIG_NAMES = ("config.json", "model_config.json")
FOREIGN_TYPES = (None, "deberta", "deberta-v2")


def read_config_fields(folder: Path) -> dict[str, object] | None:
    """The fields of a folder's configuration, or None when it has none."""
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            try:
                fields = json.loads((folder / name).read_text(encoding="utf-8"))
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


def find_foreign_config(folder: Path) -> DebertaConfig:
    """The architecture of a foreign folder. Raises CheckpointError when it is none that we have."""
    fields = read_config_fields(folder)
    assert fields is not None, "asked for a folder that is_foreign_folder accepts"
    try:
        return from_foreign_config(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} does not describe a DeBERTa that can be loaded: {explain(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: all shards of safetensors, or one pickled file."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("weights.safetensors"))
    files = files or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder} has no model*.safetensors, weights.safetensors or pytorch_model.bin")
    return files


def read_file(file: Path) -> dict[str, Tensor]:
    """Tensors of one file. Raises CheckpointError when it is damaged, or holds anything else."""
    content = read_pickle(file) if file.suffix == ".bin" else read_safetensors(file)
    is_table = isinstance(content, dict)
    if not is_table or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()):
        raise CheckpointError(f"{file} is no table of named tensors, as a model's weights are")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Contents of a safetensors file."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; restore it from a copy") from error


def read_pickle(file: Path) -> object:
    """Contents of a pickled file; nothing in it is executed."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        # torch's own message is left out: it advises to load the file without this protection.
        raise CheckpointError(
            f"{file} is damaged, or holds other things than tensors, which are not loaded: a pickle can run any "
            "program; restore the file from a copy, or get the weights as safetensors"
        ) from error


def read_foreign_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a foreign folder under our names; other tensors are left out, with a warning that names them."""
    weights: dict[str, Tensor] = {}
    ignored = []
    for file in weight_files(folder):
        for name, tensor in read_file(file).items():
            ours = from_microsoft(name)
            if ours is None:
                ignored.append(name)
            else:
                weights[ours] = tensor
    if ignored:
        logger.warning("%s: %d tensors are not used: %s", folder, len(ignored), ", ".join(ignored[:8]))
    return weights
