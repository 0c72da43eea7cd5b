"""Weights without an engine: read them from a run, a checkpoint or a weights folder, into a model; write a weights
folder.

A weights folder is `model.safetensors` (canonical names; shards and their index where it is large), `config.json` and
`tokenizer/`; a checkpoint holds the last two as well. Nothing here is collective, and DeepSpeed is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deberta_xl.base.durable import below, write_files
from deberta_xl.base.progress import progress
from deberta_xl.checkpoint.destination import whole_or_nothing
from deberta_xl.checkpoint.folders import newest_whole_checkpoint, verify_checkpoint
from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors, check_finite, in_memory, read_all
from deberta_xl.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    file_facts,
    write_manifest,
)
from deberta_xl.checkpoint.rank_file import Piece, fill, read_stored
from deberta_xl.checkpoint.stored_index import StoredIndex
from deberta_xl.checkpoint.tensor_files import INDEX_SUFFIX, WEIGHTS_NAME, open_tensors
from deberta_xl.checkpoint.tensor_writer import DEFAULT_SHARD_BYTES, Advance, no_progress, total_bytes, write_shards
from deberta_xl.data.tokenizer import Tokenizer, tokenizer_contents
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import Sharing
from deberta_xl.weights.native_config import UNRECORDED, Learnt, native_config, read_native_config
from deberta_xl.weights.pair import Part, merged_discriminator, no_generator, split_part, tensors_of, with_part
from deberta_xl.weights.pretrained_folder import ORIGIN_NAME, Origin, Pretrained, complete

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer"


def files_beside_weights(
    architecture: DebertaConfig,
    tokenizer: Tokenizer,
    *,
    generator: DebertaConfig | None = None,
    sharing: Sharing | None = None,
    learnt: Learnt = UNRECORDED,
) -> dict[str, bytes]:
    """`config.json` and `tokenizer/`, which a checkpoint holds as well: name -> content.

    A pair of discriminator (`architecture`) and generator says how they share tables, too.
    """
    config = native_config(architecture, generator=generator, sharing=sharing, learnt=learnt)
    content = json.dumps(config, indent=2).encode()
    return {CONFIG_NAME: content, **below(TOKENIZER_NAME, tokenizer.files())}


def find_weights_folder(folder: Path) -> Path:
    """The verified folder with the weights, `config.json` and `tokenizer/` behind what a user named.

    `folder` is a weights folder, a checkpoint, or a run folder (its newest whole checkpoint is taken), with the name of
    one model of a pair behind it, or none (`pair.py`). Raises CheckpointError when it is none of them, or damaged.
    """
    folder, part = split_part(folder)
    if (folder / "checkpoints").is_dir():
        newest = newest_whole_checkpoint(folder / "checkpoints", collective=False)
        if newest is None:
            raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint yet")
        return with_part(newest, part)
    if (folder / MANIFEST_NAME).exists():
        verify_checkpoint(folder, collective=False)
    elif weights_file(folder) is None:
        what = "has neither" if folder.is_dir() else "is no folder; it should have"
        raise CheckpointError(
            f"{folder} {what} {WEIGHTS_NAME} (weights), {MANIFEST_NAME} (a checkpoint) or checkpoints/ (a run)"
        )
    return with_part(folder, part)


def weights_file(folder: Path) -> Path | None:
    """The weights of a weights folder, or the index of their shards; None when there are none."""
    for path in (folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}{INDEX_SUFFIX}"):
        if path.is_file():
            return path
    return None


def open_weights(folder: Path) -> LazyTensors:
    """Name → weight as stored, from a folder given by `find_weights_folder`; each is read when asked for.

    From a checkpoint, of any layout, these are the float32 master weights. Of a pair they are those of both models.
    Raises CheckpointError when the files do not hold them.
    """
    if (path := weights_file(folder)) is not None:
        return open_tensors(path)
    try:
        stored = read_stored(folder)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} holds no weights that can be read: {error}") from None
    return {name: _stored_weight(name, shape, stored, folder) for name, shape in stored.logical_shapes.items()}


def _stored_weight(name: str, shape: tuple[int, ...], stored: StoredIndex, folder: Path) -> LazyTensor:
    """A master weight, put together from the rank files of a checkpoint."""

    def read() -> Tensor:
        weight = torch.empty(shape, dtype=torch.float32)
        try:
            fill([(Piece(name, shape, 0, weight.numel()), weight.view(-1))], stored, "master")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder}: {name} cannot be read: {error}") from None
        return weight

    return LazyTensor(shape, torch.float32, read, f"{folder}: {name}")


def open_model(folder: Path) -> tuple[DebertaConfig, LazyTensors]:
    """Architecture, and canonical name → weight, of the one model meant by a folder given by `find_weights_folder`."""
    folder, part = split_part(folder)
    stated = read_native_config(folder / CONFIG_NAME)
    tensors = open_weights(folder)
    if stated.generator is None:
        if part == "generator":
            raise CheckpointError(no_generator(folder))
        return stated.architecture, tensors
    if part == "generator":
        return stated.generator, tensors_of("generator", tensors)
    return stated.architecture, merged_discriminator(tensors, stated.sharing, folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All of `open_weights`; the memory needed is that of the model."""
    return read_all(open_weights(folder))


def open_native(folder: Path, *, may_be_fresh: bool = False, takes_any_head: bool = False) -> Pretrained:
    """The model in a folder given by `find_weights_folder`, to be read tensor by tensor.

    `may_be_fresh` lets absolute positions and the masked-LM head be absent, as they are in a model for a task;
    `takes_any_head` lets there be one of an objective of a user's own.
    """
    config, tensors = open_model(folder)
    tensors, fresh = complete(tensors, config, folder, may_be_fresh=may_be_fresh, takes_any_head=takes_any_head)
    place, part = split_part(folder)
    tokenizer, origin = place / TOKENIZER_NAME, Origin.read(place / origin_name(part))
    return Pretrained(
        folder=place,
        kind="native",
        config=config,
        tensors=tensors,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        origin=origin,
        fresh=fresh + (origin.fresh if origin else ()),
        learnt=read_native_config(place / CONFIG_NAME).learnt,
    )


def origin_name(part: Part | None) -> str:
    """The file with the origin of one model of a folder."""
    return f"generator_{ORIGIN_NAME}" if part == "generator" else ORIGIN_NAME


def check_fits(
    model: nn.Module, weights: Mapping[str, Tensor | LazyTensor], folder: Path, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Refuse weights of which the model needs others: every parameter that begins with one of `prefixes`."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            if name not in weights:
                raise CheckpointError(f"{folder} has no tensor for {name}")
            if weights[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {list(weights[name].shape)}, the configuration asks for "
                    f"{list(parameter.shape)}"
                )


def fill_model(model: nn.Module, weights: Mapping[str, Tensor], source: Path, dtype: torch.dtype) -> None:
    """Make `weights` the parameters of `model`; every one must be there, fit, and be finite."""
    check_fits(model, weights, source)
    check_finite(weights, source)
    known = {name: weights[name].to(dtype) for name, _ in model.named_parameters()}
    buffers = model.state_dict().keys() & dict(model.named_buffers()).keys()  # of a user's head: they stay
    model.load_state_dict(known | {name: model.get_buffer(name) for name in buffers}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer_folder: Path | None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a weights folder: all of it, or nothing. `extra_files` go along, by their names in it.

    A manifest with the hash of the weights goes with them, so that later damage is noticed. Raises CheckpointError
    when `folder` exists and is not empty, or cannot be written, or a weight is NaN or infinite.
    """
    tensors = in_memory({name: weight.detach().cpu() for name, weight in weights.items()}, "the model")
    sources = {CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode()}
    sources |= extra_files or {}
    if tokenizer_folder is not None:
        sources |= below(TOKENIZER_NAME, tokenizer_contents(tokenizer_folder))
    with whole_or_nothing(folder, total_bytes(tensors)) as partial:
        write_native(partial, tensors, sources)


def write_native(
    partial: Path,
    tensors: LazyTensors,
    sources: Mapping[str, bytes],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    advance: Advance = no_progress,
) -> None:
    """Write the weights, the other files of a weights folder (`sources`), and the manifest, into an empty folder."""
    write_files(partial, sources)
    names = write_shards(partial, tensors, shard_bytes=shard_bytes, advance=advance)
    with progress("hashing", total_bytes(tensors)) as hashed:
        write_manifest(partial, {name: file_facts(partial / name, hashed) for name in names})
