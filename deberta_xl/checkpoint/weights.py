"""Weights without an engine: read them from a run, a checkpoint or a weights folder; write a weights folder.

A weights folder is `model.safetensors` (canonical names), `config.json` and `tokenizer/`; a checkpoint holds the last
two as well. Nothing here is collective, and DeepSpeed is not needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deberta_xl.checkpoint.durable import sync_file, sync_folder, write_files
from deberta_xl.checkpoint.folders import newest_whole_checkpoint, verify_checkpoint
from deberta_xl.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    file_facts,
    inside,
    read_manifest,
    write_manifest,
)
from deberta_xl.checkpoint.rank_file import Piece, fill, is_rank_file, logical_shapes, read_indices

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer"


def find_weights_folder(folder: Path) -> Path:
    """The verified folder with the weights, `config.json` and `tokenizer/` behind what a user named.

    `folder` is a weights folder, a checkpoint, or a run folder (its newest whole checkpoint is taken). Raises
    CheckpointError when it is none of them, or damaged.
    """
    if (folder / "checkpoints").is_dir():
        newest = newest_whole_checkpoint(folder / "checkpoints", collective=False)
        if newest is None:
            raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint yet")
        return newest
    if (folder / MANIFEST_NAME).exists():
        verify_checkpoint(folder, collective=False)
    elif not (folder / WEIGHTS_NAME).is_file():
        what = "has neither" if folder.is_dir() else "is no folder; it should have"
        raise CheckpointError(
            f"{folder} {what} {WEIGHTS_NAME} (weights), {MANIFEST_NAME} (a checkpoint) or checkpoints/ (a run)"
        )
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Canonical name → weight, from a folder given by `find_weights_folder`.

    From a checkpoint, of any layout, these are the float32 master weights; one file is open at a time, so the memory
    needed is that of the model. Raises CheckpointError when the files do not hold them.
    """
    try:
        if (folder / WEIGHTS_NAME).is_file():
            return load_file(folder / WEIGHTS_NAME)
        stored = read_indices(inside(folder, name) for name in read_manifest(folder) if is_rank_file(name))
        weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in logical_shapes(stored).items()}
        fill([(Piece(n, tuple(w.shape), 0, w.numel()), w.view(-1)) for n, w in weights.items()], stored, "master")
        return weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} holds no weights that can be read: {error}") from None


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer_folder: Path | None
) -> None:
    """Write a weights folder: all of it, or nothing.

    A manifest with the hash of the weights goes with them, so that later damage is noticed. Raises CheckpointError
    when `folder` exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; choose another folder, or delete it")
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    sources: dict[str, Path | bytes] = {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode()}
    if tokenizer_folder is not None:
        sources[TOKENIZER_NAME] = tokenizer_folder
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_files(partial, sources)
        save_file(
            {n: w.detach().cpu().contiguous() for n, w in weights.items()}, partial / WEIGHTS_NAME, {"format": "pt"}
        )
        sync_file(partial / WEIGHTS_NAME)
        write_manifest(partial, {WEIGHTS_NAME: file_facts(partial / WEIGHTS_NAME)})
        partial.rename(folder)
        sync_folder(folder.parent)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
