"""Starting a discriminator and its generator from weights that are there (`train.init` of replaced token detection).

| there | the discriminator | the generator |
|---|---|---|
| a pair | is taken | is taken |
| a discriminator alone | is taken | made of its layers, evenly spaced, and its tables, to which nothing is added yet |
| a masked-LM model | its trunk, and a new detector | made in the same way, with its masked-LM head |

A generator whose sizes differ from the discriminator's in more than depth begins fresh, but for shared tables. How
tables are shared here need not be how they were shared there.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors, read_finite
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import Sharing
from deberta_xl.weights.initial_weights import check_same_architecture, open_pretrained
from deberta_xl.weights.named_folder import first_that_opens
from deberta_xl.weights.names import DELTA, DETECTOR
from deberta_xl.weights.pair import TABLES, native_pair
from deberta_xl.weights.pair_folder import not_fresh, open_pair
from deberta_xl.weights.pretrained_folder import Pretrained, describe_fresh, spaced_layers, with_layers_kept

OWN_SIZES = ("num_layers", "hidden_size", "num_heads", "intermediate_size")
"""What the section `generator` sets; the rest is the discriminator's."""

OF_A_GENERATOR = ("embeddings.", "encoder.", "decoder.", "head.")
"""How the names of its parameters begin."""


class Start(NamedTuple):
    """What two models begin with."""

    tensors: LazyTensors
    """Under the names of a native pair."""
    remarks: list[str]
    """What was made or left out, for people."""


def peek_initial_pair(
    directory: str | Path, discriminator: DebertaConfig, generator: DebertaConfig, sharing: Sharing
) -> None:
    """Look, by names and shapes in the headers of the files, whether a start can read the weights in `directory`.

    Says what will be made or left out. Raises ConfigError when there is not what the two architectures ask for.
    """
    _, start = first_that_opens(Path(directory), lambda folder: start_of(folder, discriminator, generator, sharing))
    for remark in start.remarks:
        rank_zero("train.init=%s %s", directory, remark, level=logging.WARNING)


@torch.no_grad()
def load_initial_pair(model: nn.Module, folder: Path) -> None:
    """Start `model.generator` and `model.discriminator`, in place, from a folder given by `find_pretrained`.

    What is not there stays as it is; `peek_initial_pair` has said so. Raises ConfigError when the weights cannot be
    read, or are of other architectures.
    """
    parameters = dict(model.named_parameters())
    start = start_of(folder, model.discriminator.config, model.generator.config, sharing_of(parameters))
    try:
        for name, parameter in parameters.items():
            if name in start.tensors:
                check_fits_parameter(name, parameter, start.tensors[name])
                parameter.copy_(read_finite(name, start.tensors[name]))
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error
    if fresh := [name for name in parameters if name not in start.tensors]:
        rank_zero("%s has no %s: fresh", folder, ", ".join(fresh))


def check_fits_parameter(name: str, parameter: Tensor, tensor: LazyTensor) -> None:
    """Raise CheckpointError for a tensor of another shape, which no architecture has ruled out: a detector's."""
    if tuple(parameter.shape) != tensor.shape:
        raise CheckpointError(
            f"{tensor.place} has shape {list(tensor.shape)}, where {name} has {list(parameter.shape)}"
        )


def sharing_of(names: Container[str]) -> Sharing:
    """How two models share their tables, as the names of their parameters tell."""
    return next((sharing for sharing, name in SIGNS.items() if name in names), "es")


OWN_TABLES = tuple(f"{table}.weight" for table in TABLES)
SIGNS: dict[Sharing, str] = {
    "gdes": "discriminator.embeddings.word_delta.weight",
    "none": "discriminator.embeddings.word.weight",
}


def start_of(folder: Path, discriminator: DebertaConfig, generator: DebertaConfig, sharing: Sharing) -> Start:
    """What two models of these architectures begin with. Raises ConfigError for weights of others."""
    try:
        pair = open_pair(folder)
        if pair is not None:
            check_same_architecture(discriminator, pair.discriminator.config, folder)
            check_same_generator(generator, pair.generator.config, folder)
            own, partner = not_fresh(pair.discriminator), pair.generator.tensors
            fresh = pair.generator.fresh
            remarks = [f"has a generator that lacks {describe_fresh(fresh)}"] if fresh else []
            if sharing == "es" and pair.sharing != "es":
                own = {name: tensor for name, tensor in own.items() if name not in OWN_TABLES}
                remarks += [
                    "shares tables in another way: the discriminator reads the generator's as they are (sharing=es)"
                ]
        else:
            model = open_pretrained(folder, may_be_fresh=True)
            check_same_architecture(discriminator, model.config, folder)
            # What it had added was to a table of another generator, which is not there.
            own = {name: tensor for name, tensor in not_fresh(model).items() if not name.endswith(DELTA)}
            partner, remarks = generator_from(model, generator)
            remarks += [] if DETECTOR in model.tensors else ["has no detector: the discriminator's begins anew"]
        return Start(native_pair(own, partner, discriminator, sharing), remarks)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error


def generator_from(model: Pretrained, generator: DebertaConfig) -> tuple[LazyTensors, list[str]]:
    """A generator made of a discriminator, or of a masked-LM model, and what is to be said of it.

    Absent absolute positions are zeros in it; an absent masked-LM head is left to the caller.
    """
    what = "a discriminator without its generator" if DETECTOR in model.tensors else "one model, and no pair"
    lacks = f", and it lacks {describe_fresh(model.fresh)}" if model.fresh else ""
    if any(getattr(generator, name) != getattr(model.config, name) for name in OWN_SIZES[1:]):
        is_as_wide = generator.embedding_width == model.config.embedding_width
        taken = {name: model.tensors[name] for name in OWN_TABLES if is_as_wide and name in model.tensors}
        tables = " but for its tables, which are taken" if taken else ""
        return taken, [f"is {what}: the generator has other sizes and begins fresh{tables}"]
    if generator.num_layers > model.config.num_layers:
        raise ConfigError(
            f"train.init={model.folder}: a generator of {generator.num_layers} layers cannot be made of "
            f"{model.config.num_layers}; set generator.num_layers={max(2, model.config.num_layers // 2)}"
        )
    kept = spaced_layers(model.config.num_layers, generator.num_layers)
    tensors = with_layers_kept(model.tensors, kept)
    left = {name for name in model.fresh if not name.startswith("embeddings.")}
    taken = {name: tensor for name, tensor in tensors.items() if name.startswith(OF_A_GENERATOR) and name not in left}
    layers = ", ".join(map(str, kept))
    return taken, [f"is {what}: the generator is made of its layers {layers} and its tables{lacks}"]


def check_same_generator(here: DebertaConfig, there: DebertaConfig, folder: Path) -> None:
    """Raise ConfigError, with what to type, when the generator in `folder` has other sizes than the one to be trained.

    What else may differ would do so in the discriminator, too, or is named as there.
    """
    different = {name: getattr(there, name) for name in OWN_SIZES if getattr(there, name) != getattr(here, name)}
    if different:
        settings = " ".join(f"generator.{name}={value}" for name, value in different.items())
        raise ConfigError(f"train.init={folder}: its generator has other sizes than configured; set {settings}")
    check_same_architecture(here, there, folder / "generator")
