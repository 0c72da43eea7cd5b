"""Fine-tuned models: their folders, and starting one from pretrained weights."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from deberta_xl.architecture import DebertaConfig, HeadConfig
from deberta_xl.checkpoint.foreign import is_foreign_folder, open_foreign, read_config_fields
from deberta_xl.checkpoint.foreign_config import activation_there
from deberta_xl.checkpoint.foreign_heads import Pooling, read_foreign_task, read_pooling
from deberta_xl.checkpoint.head_facts import HEAD_NAME, HeadFacts, read_head
from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors, check_finite, read_all
from deberta_xl.checkpoint.manifest import CheckpointError, step_folder_name
from deberta_xl.checkpoint.names import EXTRA
from deberta_xl.checkpoint.native_config import native_config, read_native_config
from deberta_xl.checkpoint.pretrained_folder import ORIGIN_NAME, Origin
from deberta_xl.checkpoint.weights import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    find_weights_folder,
    open_weights,
    read_weights,
    write_weights,
)
from deberta_xl.errors import ConfigError
from deberta_xl.log import rank_zero
from deberta_xl.model.heads import TaskModel
from deberta_xl.pretrained import find_pretrained, first_that_opens
from deberta_xl.pretrained import peek as peek_pretrained

BEST_NAME = "best"
PROJECTION = ("classifier.weight", "classifier.bias")
ENCODER = ("embeddings.", "encoder.")


def find_finetuned(directory: str | Path) -> Path:
    """The folder with the weights behind what a user named, verified: of a run, its best weights."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder")
    directory = best_or_itself(directory)
    return directory if is_foreign_folder(directory) else find_weights_folder(directory)


def best_or_itself(directory: Path) -> Path:
    """A fine-tuning run's best weights; what is none, as it is."""
    return directory / BEST_NAME if (directory / BEST_NAME).is_dir() else directory


def peek(directory: Path) -> tuple[Path, DebertaConfig]:
    """`pretrained.peek`, of a fine-tuning run into its best weights; `find_init` verifies them."""
    return peek_pretrained(best_or_itself(directory))


def peek_pooling(folder: Path, architecture: DebertaConfig) -> Pooling:
    """What stands behind [CLS] in a folder given by `peek`: a head that starts from its weights computes the same.

    Raises ConfigError when its configuration asks for what we do not compute.
    """
    try:
        if is_foreign_folder(folder):
            return read_pooling(read_config_fields(folder) or {})
        if (folder / HEAD_NAME).is_file():
            head = read_head(folder).head
            return Pooling(head.pooler_act, head.pooler_dropout)
        origin = Origin.read(folder / ORIGIN_NAME)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error
    if origin is None:
        return Pooling()
    model_type = "deberta-v2" if origin.kind == "huggingface" else None
    return read_pooling(
        origin.fields | {"model_type": model_type, "hidden_act": activation_there(architecture.hidden_act)}
    )


def find_init(directory: Path) -> Path:
    """The verified folder to start from: a fine-tuning run's best weights, or what `find_pretrained` finds."""
    try:
        return find_pretrained(best_or_itself(directory))
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error


class DebertaForTask(TaskModel):
    """DeBERTa fine-tuned for a task. See `TaskModel.forward`."""

    facts: HeadFacts

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """The fine-tuned model in a run, checkpoint or weights folder, or one of transformers', in evaluation mode.

        Raises CheckpointError when files are missing or damaged, or the folder holds no fine-tuned model.
        """
        folder = find_finetuned(directory)
        if is_foreign_folder(folder):
            config, facts, weights = read_foreign_task(folder)
        else:
            config, facts, weights = read_native_config(folder / CONFIG_NAME), read_head(folder), read_weights(folder)
        with torch.device("meta"):
            model = cls(config, facts.head)
        model.facts = facts
        check_fits(model, weights, folder)
        names = [name for name, _ in model.named_parameters()]
        model.load_state_dict({name: weights[name].to(dtype) for name in names}, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, tokenizer: str | Path | None = None) -> None:
        """Write a weights folder. Raises CheckpointError when it exists and is not empty."""
        weights = {name: p.detach() for name, p in self.named_parameters()}
        write_finetuned(Path(directory), weights, self.config, self.facts, Path(tokenizer) if tokenizer else None)


def write_finetuned(
    folder: Path, weights: Mapping[str, Tensor], config: DebertaConfig, facts: HeadFacts, tokenizer: Path | None
) -> None:
    """A weights folder of a fine-tuned model: all of it, or nothing."""
    write_weights(folder, weights, native_config(config), tokenizer, {HEAD_NAME: facts.to_json()})


def replace_best(run_folder: Path, best_step: int) -> None:
    """Write the weights of a run's best checkpoint into its folder `best`, in place of older ones."""
    source = run_folder / "checkpoints" / step_folder_name(best_step)
    shutil.rmtree(run_folder / BEST_NAME, ignore_errors=True)
    facts, config = read_head(source), read_native_config(source / CONFIG_NAME)
    write_finetuned(run_folder / BEST_NAME, read_weights(source), config, facts, source / TOKENIZER_NAME)


def check_fits(
    model: TaskModel, weights: Mapping[str, Tensor | LazyTensor], folder: Path, prefixes: tuple[str, ...] = ("",)
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


def open_any_weights(folder: Path) -> LazyTensors:
    """Weights under our names of a pretrained or fine-tuned folder of any layout; those of a head, too."""
    if not is_foreign_folder(folder):
        return open_weights(folder)
    model = open_foreign(folder, may_be_fresh=True)
    fresh = model.origin.fresh if model.origin else ()
    weights = {n.removeprefix(EXTRA): tensor for n, tensor in model.tensors.items() if n not in fresh}
    return {n.replace("qa_outputs.", "classifier."): tensor for n, tensor in weights.items()}


def peek_encoder(directory: Path, architecture: DebertaConfig, head: HeadConfig) -> None:
    """Look, by names and shapes in the headers of the files, whether a start finds its encoder in `directory`.

    Raises ConfigError when it does not.
    """
    with torch.device("meta"):
        model = TaskModel(architecture, head)
    first_that_opens(
        best_or_itself(directory), lambda folder: check_fits(model, open_any_weights(folder), folder, ENCODER)
    )


@torch.no_grad()
def load_encoder(model: TaskModel, folder: Path, labels: Sequence[str]) -> None:
    """Start `model` from pretrained or fine-tuned weights in a folder given by `find_pretrained` or `find_finetuned`.

    A head for the same classes is taken too, in the order of `labels`; another one stays fresh. Either is said.
    """
    try:
        weights = read_all(open_any_weights(folder))
        check_fits(model, weights, folder, ENCODER)
        check_finite(weights, folder)
        if PROJECTION[0] in weights:
            body = {name: weight for name, weight in weights.items() if name not in PROJECTION}
            weights = body | projection_for(model, weights, folder, labels)
    except CheckpointError as error:
        raise ConfigError(f"train.init: {error}") from error
    for name, parameter in model.named_parameters():
        if name in weights and weights[name].shape == parameter.shape:
            parameter.copy_(weights[name])


def projection_for(
    model: TaskModel, weights: Mapping[str, Tensor], folder: Path, labels: Sequence[str]
) -> dict[str, Tensor]:
    """A fine-tuned folder's last projection, rows in the order of `labels`; empty where it is of no use."""
    kind, there = described_head(folder)
    here = list(labels)
    if kind == model.head.kind and sorted(there) == sorted(here):
        rank_zero("%s: its head is taken for %s", folder, ", ".join(here) or kind)
        rows = [there.index(label) for label in here] or slice(None)
        return {name: weights[name][rows] for name in PROJECTION}
    rank_zero(
        "%s was fine-tuned for %d outputs (%s %s), this task has %d (%s %s): its last projection is new", folder,
        len(weights[PROJECTION[0]]), kind, there, model.head.num_labels, model.head.kind, here, level=logging.WARNING,
    )  # fmt: skip
    return {}


def described_head(folder: Path) -> tuple[str, list[str]]:
    """What a fine-tuned folder says of its head: its kind and its classes."""
    if (folder / HEAD_NAME).is_file():
        facts = read_head(folder)
        return facts.head.kind, facts.labels
    if not is_foreign_folder(folder):  # converted from a model for a task
        return "unknown", []
    try:
        _, facts, _ = read_foreign_task(folder)
    except CheckpointError:  # a class of transformers' that is not ours
        return "unknown", []
    return facts.head.kind, facts.labels
