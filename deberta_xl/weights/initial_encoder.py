"""Starting a fine-tuning run from weights that are there (`train.init`): an encoder, a head for the same classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.lazy import LazyTensors, check_finite, read_all
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.model.task_model import TaskModel
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.weights.finetuned_folder import best_or_itself
from deberta_xl.weights.foreign import is_foreign_folder, open_foreign, read_config_fields
from deberta_xl.weights.foreign_config import activation_there
from deberta_xl.weights.foreign_heads import Pooling, from_their_head, read_foreign_task, read_pooling
from deberta_xl.weights.head_facts import HEAD_NAME, read_head
from deberta_xl.weights.named_folder import find_pretrained, first_that_opens, peek
from deberta_xl.weights.names import EXTRA
from deberta_xl.weights.native import check_fits, open_model, origin_name
from deberta_xl.weights.pair import split_part
from deberta_xl.weights.pretrained_folder import Origin

PROJECTION = ("classifier.weight", "classifier.bias")
ENCODER = ("embeddings.", "encoder.")


def peek_init(directory: Path) -> tuple[Path, DebertaConfig]:
    """`named_folder.peek`, of a fine-tuning run into its best weights; `find_init` verifies them."""
    return peek(best_or_itself(directory))


def peek_pooling(folder: Path, architecture: DebertaConfig) -> Pooling:
    """What stands behind [CLS] in a folder given by `peek_init`: a head that starts from its weights computes the same.

    Raises ConfigError when its configuration asks for what we do not compute.
    """
    try:
        if is_foreign_folder(folder):
            return read_pooling(read_config_fields(folder) or {})
        if (folder / HEAD_NAME).is_file():
            head = read_head(folder).head
            return Pooling(head.pooler_act, head.pooler_dropout)
        place, part = split_part(folder)
        origin = Origin.read(place / origin_name(part))
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


def open_any_weights(folder: Path) -> LazyTensors:
    """Weights under our names of a pretrained or fine-tuned folder of any layout; those of a head, too."""
    if not is_foreign_folder(folder):
        return open_model(folder)[1]
    model = open_foreign(folder, may_be_fresh=True)
    fresh = model.origin.fresh if model.origin else ()
    weights = {n.removeprefix(EXTRA): tensor for n, tensor in model.tensors.items() if n not in fresh}
    return {from_their_head(n): tensor for n, tensor in weights.items()}
