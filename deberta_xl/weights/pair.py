"""A discriminator and its generator in one folder: how one of them is named, and which tensors are whose.

`FOLDER` alone is the discriminator, wherever one model is wanted: it is what v3 is pretrained for. `FOLDER/generator`
is its generator, `FOLDER/discriminator` the discriminator where the pair could be meant. Neither has to be a folder.

Native tensors begin with "generator." or "discriminator.". Tables of the discriminator, by `sharing`:

    gdes   discriminator.embeddings.word_delta.weight   is added to generator.embeddings.word.weight
    es     none of its own                              the generator's
    none   discriminator.embeddings.word.weight         its own

and in the same way `position`, where the discriminator reads absolute positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors, derived
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import Sharing
from deberta_xl.weights.names import DELTA, EXTRA, to_microsoft

Part = Literal["discriminator", "generator"]
PARTS: tuple[Part, ...] = get_args(Part)
SIGNS_OF_A_MODEL = ("config.json", "model_config.json", "checkpoints")
TABLES = ("embeddings.word", "embeddings.position")
"""What a discriminator may share with its generator."""
MOST_STALE = 0.05
"""How far, as a share of a table's size, a stored sum may be from what it was made of. The original stores the sum of
its last forward pass, which the last update has moved on from; rounding to float16 is far below. Tables of two models
that do not belong together are as far apart as they are large."""


def split_part(path: Path) -> tuple[Path, Part | None]:
    """A folder, and which of its two models a path names: `runs/v3/generator` -> runs/v3, generator."""
    folder, name = path.parent, path.name
    is_named = name in PARTS and not path.exists() and any((folder / sign).exists() for sign in SIGNS_OF_A_MODEL)
    return (folder, name) if is_named else (path, None)


def with_part(folder: Path, part: Part | None) -> Path:
    """The inverse of `split_part`."""
    return folder / part if part else folder


def no_generator(folder: Path) -> str:
    """Why there is nothing behind `FOLDER/generator`."""
    return f"{folder} holds one model, and no generator beside it; leave /generator out"


def tensors_of(part: Part, tensors: LazyTensors) -> LazyTensors:
    """Those of one model of a pair, under the names of the plain model."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def delta_name(table: str) -> str:
    """What is added to a table: its name in native folders."""
    return f"{table}_delta.weight"


def rider_name(table: str) -> str:
    """What was added to a table whose sum is there: the name it travels by beside a single model."""
    return EXTRA + to_microsoft(f"{table}.weight").removesuffix(".weight") + DELTA


# In


def merged_discriminator(tensors: LazyTensors, sharing: Sharing, folder: Path) -> LazyTensors:
    """The discriminator of a native pair as a model of its own: its tables whole, what it had added behind "extra.".

    Raises CheckpointError when a table is missing, or of another shape than the generator's.
    """
    own, generator = tensors_of("discriminator", tensors), tensors_of("generator", tensors)
    if sharing == "none":
        return own
    for table in TABLES:
        name, shared, delta = f"{table}.weight", generator.get(f"{table}.weight"), own.pop(delta_name(table), None)
        is_word = table == "embeddings.word"
        if shared is None and delta is None and not is_word:
            continue  # models that decode without absolute positions have no table of them
        if shared is None or (is_word and sharing == "gdes" and delta is None):
            lacking = f"generator.{name}" if shared is None else f"discriminator.{delta_name(table)}"
            raise CheckpointError(f"{folder} has no tensor for {lacking}, which sharing={sharing} needs")
        if delta is None:
            own[name] = shared
            continue
        if delta.shape != shared.shape:
            raise CheckpointError(
                f"{folder}: discriminator.{delta_name(table)} has shape {list(delta.shape)}, the generator's table "
                f"{list(shared.shape)}: they do not belong together"
            )
        own[name], own[rider_name(table)] = derived(torch.add, (shared, delta), shared.shape), delta
    return own


# Out


def native_pair(
    discriminator: LazyTensors, generator: LazyTensors, architecture: DebertaConfig, sharing: Sharing
) -> LazyTensors:
    """The tensors of two models in the form of a native pair; the inverse of `merged_discriminator`.

    Absolute positions that the discriminator shares and does not read are the generator's alone.
    Raises CheckpointError, at the latest when a table is read, where the two do not belong together.
    """
    own = dict(discriminator)
    for table in TABLES if sharing != "none" else ():
        name, whole, delta = f"{table}.weight", own.pop(f"{table}.weight", None), own.pop(rider_name(table), None)
        shared = generator.get(name)
        is_read = table == "embeddings.word" or architecture.position_biased_input
        if whole is not None and shared is not None and is_read:
            check_shapes(whole, shared)
        if sharing == "es" and is_read and whole is not None:
            generator = generator | {name: equal_table(shared, whole)}
        elif sharing == "gdes" and is_read:
            own[delta_name(table)] = what_is_added(whole, shared, delta)
    return {f"generator.{name}": tensor for name, tensor in generator.items()} | {
        f"discriminator.{name}": tensor for name, tensor in own.items()
    }


def check_shapes(whole: LazyTensor, shared: LazyTensor) -> None:
    """Raise CheckpointError where a table is not of its generator's size."""
    if whole.shape != shared.shape:
        raise CheckpointError(
            f"{whole.place} has shape {list(whole.shape)}, and {shared.place} {list(shared.shape)}: a discriminator "
            "and a generator that do not belong together (vocabularies or widths differ)"
        )


def what_is_added(whole: LazyTensor, shared: LazyTensor, delta: LazyTensor | None) -> LazyTensor:
    """What a discriminator adds to its generator's table, so that the sum is the table it has."""
    if delta is None:
        return derived(torch.sub, (whole, shared), whole.shape)

    def checked(delta: Tensor, whole: Tensor, shared: Tensor) -> Tensor:
        added = shared + delta
        if torch.equal(added, whole):
            return delta
        error, size = ((x.float()).norm().item() for x in (added - whole, whole))
        if not error <= MOST_STALE * size:
            raise CheckpointError(
                f"{whole_place} is not the sum of its generator's table and what it adds (they differ by {error:.3g}, "
                f"its size is {size:.3g}): that generator is another discriminator's"
            )
        return (whole - shared).to(delta.dtype)

    whole_place = whole.place
    return derived(checked, (delta, whole, shared), delta.shape)


def equal_table(shared: LazyTensor, whole: LazyTensor) -> LazyTensor:
    """The one table of both models."""

    def checked(shared: Tensor, whole: Tensor) -> Tensor:
        if not torch.equal(shared, whole):
            raise CheckpointError(
                f"the tables of generator and discriminator are to be one (sharing=es), but {whole_place} is another"
            )
        return shared

    whole_place = whole.place
    return derived(checked, (shared, whole), shared.shape)
