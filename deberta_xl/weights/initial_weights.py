"""Starting a pretraining run from weights that are there (`train.init`): looked at first, read later."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.lazy import read_all
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.trunk import Trunk
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign import is_foreign_folder, open_foreign
from deberta_xl.weights.foreign_fields import DECODER
from deberta_xl.weights.named_folder import first_that_opens
from deberta_xl.weights.native import fill_model, open_native
from deberta_xl.weights.native_config import native_config
from deberta_xl.weights.pretrained_folder import TRUNK, Pretrained, describe_fresh

IDLE_TOGETHER = {"conv_act", "conv_groups"}
"""Of no effect where conv_kernel_size is 0."""
OF_RELATIVE_ROWS = {
    "share_att_key", "position_buckets", "normalize_relative_table", "max_relative_positions", "bucket_rule",
}  # fmt: skip
"""Of no effect where pos_att_type is none."""


def open_pretrained(folder: Path, *, may_be_fresh: bool = False) -> Pretrained:
    """The model in a folder given by `find_pretrained`, to be read tensor by tensor.

    With `may_be_fresh` as much of it as a run can start from, whatever the model was trained for.
    """
    if is_foreign_folder(folder):
        return open_foreign(folder, may_be_fresh=may_be_fresh)
    return open_native(folder, may_be_fresh=may_be_fresh, takes_any_head=may_be_fresh)


def read_pretrained(folder: Path, *, may_be_fresh: bool = False) -> tuple[DebertaConfig, dict[str, Tensor]]:
    """Architecture, and weights under our names, of a folder given by `find_pretrained`."""
    model = open_pretrained(folder, may_be_fresh=may_be_fresh)
    return model.config, read_all(model.tensors)


def peek_tensors(directory: str | Path) -> None:
    """Look, by names and shapes in the headers of the files, whether a start can read the weights in `directory`.

    Says what will be made fresh. Raises ConfigError when there are not the tensors that the configuration asks for.
    """
    folder, model = first_that_opens(Path(directory), lambda folder: open_pretrained(folder, may_be_fresh=True))
    if model.fresh:
        rank_zero(
            "train.init=%s lacks %s", folder, describe_fresh(model.fresh),
            level=logging.WARNING,
        )  # fmt: skip


def load_initial_weights(model: Trunk, folder: Path) -> None:
    """Start `model` from the weights in a folder given by `find_pretrained` (`train.init`).

    Absent absolute positions begin with zeros, an absent masked-LM head anew; `peek_tensors` has said so. A head of
    another kind, which the folder does not have, stays as it is.
    Raises ConfigError when they cannot be read, the architectures differ in more than dropout, or it is no trunk.
    """
    if not isinstance(model, Trunk):
        raise ConfigError(
            f"train.init fills a Trunk (deberta_xl/model/trunk.py), and {type(model).__name__} is none: let it inherit "
            "from Trunk, or its objective have a load_initial of its own"
        )
    try:
        config, weights = read_pretrained(folder, may_be_fresh=True)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error
    check_same_architecture(model.config, config, folder)
    own = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name not in weights and not name.startswith(TRUNK)
    }
    if own:
        rank_zero("%s has no %s: fresh", folder, ", ".join(own))
    fill_model(model, weights | own, folder, torch.float32)


def check_same_architecture(here: DebertaConfig, there: DebertaConfig, folder: Path) -> None:
    """Raise ConfigError when the model in `folder` differs from the one to be trained in more than dropout."""
    ours, theirs = computed_by(here), computed_by(there)
    values = {key: (theirs[key], ours[key]) for key in theirs if key in ours}
    # What only one of them has to say is of no effect in the other, such as the activation of no convolution.
    only_one = (ours.keys() ^ theirs.keys()) - IDLE_TOGETHER
    values |= {key: (resolved(there)[key], resolved(here)[key]) for key in only_one}
    different = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if different:
        pairs = ", ".join(
            f"{key} is {of_theirs} there, {of_ours} here" for key, (of_theirs, of_ours) in different.items()
        )
        longer = here.max_position_embeddings
        is_shorter = "max_position_embeddings" in different and there.max_position_embeddings < longer
        lengthens = f"python tools/convert.py --to native --max_position_embeddings {longer} {folder} NEW_FOLDER"
        raise ConfigError(
            f"train.init={folder}: another architecture: {pairs}. --config {folder} takes all of that one"
            + (f"; for longer sequences: {lengthens}, then --config and train.init of that" if is_shorter else "")
        )


def encoder_fingerprints(config: DebertaConfig, sequence_length: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run must have in common with the checkpoint it goes on from, whatever it learns."""
    return {
        "architecture": computed_by(config),
        "sequence_length": sequence_length,
        "tokenizer": tokenizer.fingerprint,
    }


def computed_by(config: DebertaConfig) -> dict[str, object]:
    """What a model computes without dropout, as far as its configuration decides it: equal for equal functions.

    The convolution's activation counts only where there is a convolution, another rule than the original's for buckets
    only where a sequence can be longer than the reach, and the decoder only where it is another than the released one.
    """
    idle = {"model_type", "hidden_dropout", "attention_dropout", "initializer_range"}
    idle |= set() if config.conv_kernel_size else IDLE_TOGETHER
    is_within_reach = config.relative_reach >= config.max_position_embeddings or not config.position_buckets
    idle |= {"bucket_rule"} if is_within_reach or config.bucket_rule == "original" else set()
    idle |= set() if config.relative_rows else OF_RELATIVE_ROWS
    idle |= set(DECODER) if config.has_released_decoder else set()
    return {key: value for key, value in resolved(config).items() if key not in idle}


def resolved(config: DebertaConfig) -> dict[str, object]:
    """A native configuration in which unset sizes are what they stand for."""
    return native_config(config) | {
        "head_dim": config.head_size,
        "embedding_size": config.embedding_width,
        "max_relative_positions": config.relative_reach,
        "decoder_passes": config.num_decoder_passes,
    }
