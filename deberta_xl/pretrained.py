"""The public model: DeBERTa with its pretraining head, loaded from and saved to folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from deberta_xl.architecture import DebertaConfig
from deberta_xl.checkpoint.foreign import is_foreign_folder, open_foreign, parse_config, read_config_fields
from deberta_xl.checkpoint.lazy import check_finite, read_all
from deberta_xl.checkpoint.manifest import CheckpointError, step_folders
from deberta_xl.checkpoint.native_config import native_config, read_native_config
from deberta_xl.checkpoint.pretrained_folder import Pretrained, describe_fresh
from deberta_xl.checkpoint.weights import CONFIG_NAME, find_weights_folder, open_native, write_weights
from deberta_xl.errors import ConfigError
from deberta_xl.log import rank_zero
from deberta_xl.model.masked_lm import MaskedLanguageModel

Opened = TypeVar("Opened")
IDLE_TOGETHER = {"conv_act", "conv_groups"}
"""Of no effect where conv_kernel_size is 0."""


class DebertaForMaskedLM(MaskedLanguageModel):
    """DeBERTa with enhanced mask decoder and masked-LM head.

    `DebertaForMaskedLM(config)` has fresh weights; `from_pretrained` reads them. See `MaskedLanguageModel.forward`.
    """

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """The model in a folder, in evaluation mode.

        `directory` may be a weights folder, a checkpoint or a run folder of ours (the newest whole checkpoint), or a
        folder in the original release's or Hugging Face's layout (v1, v2, v3) with `config.json` (or
        `model_config.json`) and `model.safetensors`, `weights.safetensors`, `pytorch_model.bin`, or shards and index.

        Raises CheckpointError when files are missing or damaged, or tensors do not fit the configuration.
        """
        source = find_pretrained(directory)
        config, weights = read_pretrained(source)
        with torch.device("meta"):
            model = cls(config)
        fill_weights(model, weights, source, dtype)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, tokenizer: str | Path | None = None) -> None:
        """Write a weights folder: `model.safetensors`, `config.json`, and `tokenizer/` where one is given.

        Raises CheckpointError when the folder exists and is not empty.
        """
        weights = {name: p.detach() for name, p in self.named_parameters()}
        write_weights(Path(directory), weights, native_config(self.config), Path(tokenizer) if tokenizer else None)


def find_pretrained(directory: str | Path) -> Path:
    """The folder with the weights behind what a user named, verified: of a run, its newest whole checkpoint."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder")
    return directory if is_foreign_folder(directory) else find_weights_folder(directory)


def peek(directory: str | Path, setting: str = "train.init") -> tuple[Path, DebertaConfig]:
    """The folder that a start from `directory` will read, as its name says, and the architecture in it.

    Nothing is verified: `find_pretrained` does that, once for all ranks. Raises ConfigError when it cannot be meant by
    `setting`.
    """
    folder = Path(directory)
    steps = step_folders(folder / "checkpoints")
    folder = steps[0] if steps else folder
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        if is_foreign_folder(folder):
            return folder, parse_config(read_config_fields(folder) or {}, folder)
        return folder, read_native_config(folder / CONFIG_NAME)
    except CheckpointError as error:
        raise ConfigError(f"{setting}: {error}") from error


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


def first_that_opens(directory: Path, opened: Callable[[Path], Opened]) -> tuple[Path, Opened]:
    """A folder, or the newest checkpoint of a run that can be opened, as the start will find it; and what that gave.

    Raises ConfigError for why the newest cannot be.
    """
    failures = []
    for folder in step_folders(directory / "checkpoints") or [directory]:
        try:
            return folder, opened(folder)
        except CheckpointError as error:
            failures.append(error)
    raise ConfigError(f"train.init: {failures[0]}") from failures[0]


def open_pretrained(folder: Path, *, may_be_fresh: bool = False) -> Pretrained:
    """The model in a folder given by `find_pretrained`, to be read tensor by tensor."""
    return (open_foreign if is_foreign_folder(folder) else open_native)(folder, may_be_fresh=may_be_fresh)


def read_pretrained(folder: Path, *, may_be_fresh: bool = False) -> tuple[DebertaConfig, dict[str, Tensor]]:
    """Architecture, and weights under our names, of a folder given by `find_pretrained`."""
    model = open_pretrained(folder, may_be_fresh=may_be_fresh)
    return model.config, read_all(model.tensors)


def fill_weights(model: MaskedLanguageModel, weights: Mapping[str, Tensor], source: Path, dtype: torch.dtype) -> None:
    """Make `weights` the parameters of `model`; every one must be there, fit, and be finite."""
    for name, parameter in model.named_parameters():
        if name not in weights:
            raise CheckpointError(f"{source} has no tensor for {name}")
        if weights[name].shape != parameter.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(weights[name].shape)}, the configuration asks for "
                f"{list(parameter.shape)}"
            )
    check_finite(weights, source)
    known = {name: weights[name].to(dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(known, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def computed_by(config: DebertaConfig) -> dict[str, object]:
    """What a model computes without dropout, as far as its configuration decides it: equal for equal functions.

    Unset sizes count as what they stand for; the convolution's activation counts only where there is a convolution,
    and another rule than the original's for buckets only where a sequence can be longer than the reach.
    """
    idle = {"model_type", "hidden_dropout", "attention_dropout", "initializer_range"}
    idle |= set() if config.conv_kernel_size else IDLE_TOGETHER
    is_within_reach = config.relative_reach >= config.max_position_embeddings or not config.position_buckets
    idle |= {"bucket_rule"} if is_within_reach or config.bucket_rule == "original" else set()
    sizes = {
        "head_dim": config.head_size,
        "embedding_size": config.embedding_width,
        "max_relative_positions": config.relative_reach,
    }
    return {key: value for key, value in (native_config(config) | sizes).items() if key not in idle}


def load_initial_weights(model: MaskedLanguageModel, folder: Path) -> None:
    """Start `model` from the weights in a folder given by `find_pretrained` (`train.init`).

    Absent absolute positions begin with zeros, an absent masked-LM head anew; `peek_tensors` has said so.
    Raises ConfigError when they cannot be read, or the architectures differ in more than dropout.
    """
    try:
        config, weights = read_pretrained(folder, may_be_fresh=True)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error
    check_same_architecture(model.config, config, folder)
    fill_weights(model, weights, folder, torch.float32)


def check_same_architecture(here: DebertaConfig, there: DebertaConfig, folder: Path) -> None:
    """Raise ConfigError when the model in `folder` differs from the one to be trained in more than dropout."""
    ours, theirs = computed_by(here), computed_by(there)
    values = {key: (theirs[key], ours[key]) for key in theirs if key in ours}
    # What only one of them has to say is of no effect in the other, such as the activation of no convolution.
    values |= {key: (getattr(there, key), getattr(here, key)) for key in (ours.keys() ^ theirs.keys()) - IDLE_TOGETHER}
    different = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if different:
        pairs = ", ".join(
            f"{key} is {of_theirs} there, {of_ours} here" for key, (of_theirs, of_ours) in different.items()
        )
        raise ConfigError(
            f"train.init={folder}: another architecture: {pairs}. --config {folder} takes all of that one"
        )
