"""What a fine-tuning run needs, read and checked before DeepSpeed is imported."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deberta_xl.architecture import DebertaConfig, HeadConfig
from deberta_xl.checkpoint.manifest import step_folders
from deberta_xl.config import ScheduleSection
from deberta_xl.config_file import load_config, model_folder
from deberta_xl.data.entity_tags import scheme_of
from deberta_xl.data.preprocessing import is_held_out
from deberta_xl.data.task_features import TaskData
from deberta_xl.data.task_labels import class_weights, labels_of
from deberta_xl.data.task_metrics import check_defined
from deberta_xl.data.task_reading import read_split, splits_of
from deberta_xl.data.tasks import Example, Task, load_task
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.deepspeed_config import DeepSpeedConfig, load_deepspeed_config
from deberta_xl.entry_point import launch_of
from deberta_xl.errors import ConfigError
from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.launch import Launch
from deberta_xl.log import rank_zero
from deberta_xl.parallel.grid import Grid, check_divisible

if TYPE_CHECKING:
    from deberta_xl.checkpoint.foreign_heads import Pooling
    from deberta_xl.checkpoint.head_facts import HeadFacts

TRAIN, VALID = "train", "valid"
MANY_SHARED = 0.01
"""Share of held-out examples whose texts are trained on, above which that is said."""
DEFAULT_PRESET = "finetune"
SHORT_FORMS = {"task": "task.name", "data": "task.data", "init": "train.init"}
"""Options of the command line that stand for keys of the configuration."""


class Inputs(NamedTuple):
    """Everything that a run is assembled from."""

    config: FinetuneConfig
    engine: DeepSpeedConfig
    launch: Launch
    grid: Grid
    tokenizer: Tokenizer
    tokenizer_folder: Path
    architecture: DebertaConfig
    head: HeadFacts
    train_data: TaskData
    held_out: Mapping[str, TaskData]
    total_steps: int
    schedule: ScheduleSection
    class_weights: np.ndarray | None
    """float32 [classes]; None where all count alike."""
    fingerprints: Mapping[str, Any]
    """What a checkpoint must agree with to be continued."""


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """Read and check configuration, launcher, the checkpoint's description and the task's files. Raises UserError."""
    config = read_config(arguments.config, arguments.overrides)
    engine = load_deepspeed_config(arguments.deepspeed_config, config)
    launch = launch_of(arguments)
    refuse_pipeline(config)
    grid = Grid.for_run(launch.rank, launch.world_size, config.parallel)
    engine.agree(grid.data_parallel_size, config)
    check_given(config)
    task = load_task(config.task.name)
    if config.train.class_weights != "none" and not task.has_classes:
        raise ConfigError(f"train.class_weights=balanced: a {task.head} has no classes to weigh; leave it at none")
    examples = read_examples(task, config)
    architecture, pooling, tokenizer_folder = describe_init(config)
    check_divisible(architecture, grid.tensor_parallel_size)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(f"{tokenizer_folder} has {tokenizer.vocab_size} ids, the model {architecture.vocab_size}")
    labels = labels_of(task, examples[TRAIN], {split: found for split, found in examples.items() if split != TRAIN})
    data = {split: tokenize(task, labels, split, found, tokenizer, config) for split, found in examples.items()}
    for split, of_split in data.items():
        if split == VALID or (split != TRAIN and of_split.is_labelled):
            check_defined(task, labels, of_split.examples, where=f"{config.task.data}, {split}")
    report_measures(task, labels, examples)
    head = describe_head(task, labels, architecture, pooling, config)
    if not config.train.fresh_weights and not step_folders(Path(config.run.folder) / "checkpoints"):
        check_weights(config, architecture, head)
    total_steps = config.train.total_steps(len(data[TRAIN]))
    weights = weights_of_classes(task, head, data[TRAIN], config)
    return Inputs(
        config, engine, launch, grid, tokenizer, tokenizer_folder, architecture, head, data.pop(TRAIN), data,
        total_steps, config.schedule.for_steps(total_steps), weights,
        fingerprints_of(architecture, head, examples[TRAIN], tokenizer, config),
    )  # fmt: skip


def report_measures(task: Task, labels: Sequence[str], examples: Mapping[str, Sequence[Example]]) -> None:
    """Say what the metrics are of, where that was found out, and how much of what is held out is trained on."""
    if "span_f1" in task.metrics:
        rank_zero("entities are read from tags of the scheme %s", scheme_of(labels).name)
    if "f1" in task.metrics and task.labels is None:
        rank_zero("f1 is of the label %r, the second of %s", labels[1], ", ".join(labels))
    trained = {example.texts for example in examples[TRAIN]}
    for split, found in examples.items():
        shared = sum(example.texts in trained for example in found) if split != TRAIN else 0
        if shared > MANY_SHARED * len(found):
            text = "%s: the texts of %d of %d examples are trained on, too: its metrics tell little of new texts"
            rank_zero(text, split, shared, len(found), level=logging.WARNING)


def read_config(name: str, overrides: Sequence[str]) -> FinetuneConfig:
    """The configuration of a preset or TOML file; of a model's folder, the preset `finetune` of that model."""
    folder = model_folder(name, FinetuneConfig)
    if folder is None:
        return load_config(name, overrides, FinetuneConfig)
    config = load_config(DEFAULT_PRESET, [f"train.init={folder}", *overrides], FinetuneConfig)
    if config.train.init is None or Path(config.train.init).resolve() != folder.resolve():
        raise ConfigError(
            f"--config {folder}: a fine-tuned model has the architecture of the one it starts from, which is to be "
            f"{config.train.init}; leave out one of the two (--config {DEFAULT_PRESET} goes with any)"
        )
    return config


def check_weights(config: FinetuneConfig, architecture: DebertaConfig, head: HeadFacts) -> None:
    """Refuse a checkpoint to start from without the tensors that it should have."""
    from deberta_xl.checkpoint.initial_encoder import peek_encoder

    peek_encoder(Path(config.train.init), architecture, head.head)


def refuse_pipeline(config: FinetuneConfig) -> None:
    """Stages pass on one forward per micro-batch; fine-tuning's objective makes several."""
    stages = config.parallel.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={stages} is for pretraining; fine-tuning divides a model by "
            "parallel.tensor_parallel_size and the ZeRO stage of the DeepSpeed JSON"
        )


def check_given(config: FinetuneConfig) -> None:
    """Refuse a run without task, data or checkpoint."""
    for short, key in SHORT_FORMS.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) is None:
            raise ConfigError(f"{key} is not set: give it by --{short} (deberta_xl/finetune.py --help has an example)")


def read_examples(task: Task, config: FinetuneConfig) -> dict[str, list[Example]]:
    """The examples of every split that is there; training and validation must be."""
    folder, share = Path(config.task.data), config.task.valid_share
    there = splits_of(task, folder)
    if share and VALID in there:
        raise ConfigError(f"task.valid_share={share}, but {folder} has a {VALID} split of its own; leave it unset")
    wanted = dict.fromkeys([TRAIN, *([] if share else [VALID]), *there])
    examples = {split: read_split(task, folder, split) for split in wanted}
    if share:
        examples[TRAIN], examples[VALID] = hold_out(task, examples[TRAIN], share)
    limit = {TRAIN: config.task.max_train_examples}
    return {name: found[: limit.get(name, config.task.max_eval_examples) or None] for name, found in examples.items()}


def hold_out(task: Task, examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and about a `share` of them to evaluate on: which, follows from an example's first text.

    So copies of a text, and the questions about it, are on one side, whatever the order of the file.
    """
    parts: tuple[list[Example], list[Example]] = [], []
    for example in examples:
        text = repr(example.texts if task.head == "token" else example.texts[0])
        parts[is_held_out(text, share)].append(example)
    if not all(parts):
        raise ConfigError(
            f"task.valid_share={share} divides {len(examples)} examples into {len(parts[0])} to train on and "
            f"{len(parts[1])} held out; choose another share"
        )
    return parts


def describe_init(config: FinetuneConfig) -> tuple[DebertaConfig, Pooling, Path]:
    """Architecture, pooler and tokenizer folder of the checkpoint to start from; its weights are read later."""
    from deberta_xl.checkpoint.initial_encoder import peek_init, peek_pooling
    from deberta_xl.checkpoint.named_folder import find_tokenizer

    folder, architecture = peek_init(Path(config.train.init))
    return config.model.applied_to(architecture), peek_pooling(folder, architecture), find_tokenizer(folder)


def tokenize(
    task: Task, labels: Sequence[str], split: str, examples: Sequence[Example], tokenizer: Tokenizer,
    config: FinetuneConfig,
) -> TaskData:  # fmt: skip
    """A split as token ids; what was cut is reported."""
    data = TaskData(
        task,
        labels,
        examples,
        tokenizer,
        sequence_length=config.model.sequence_length,
        document_stride=config.model.document_stride,
        is_training=split == TRAIN,
        where=f"{config.task.data}, {split}",
    )
    cuts = data.cuts
    if cuts.truncated:
        rank_zero(
            "%s: %d of %d examples are longer than model.sequence_length=%d and were cut (docs/finetuning.md says how)",
            split, cuts.truncated, cuts.total, config.model.sequence_length,
        )  # fmt: skip
    if cuts.mismatched:
        rank_zero(
            "%s: %d of %d answers are not where they are said to be; left out", split, cuts.mismatched, cuts.total
        )
    if cuts.unreached:
        rank_zero(
            "%s: %d of %d answers fit into no window of model.sequence_length=%d; trained on as if there were none",
            split, cuts.unreached, cuts.total, config.model.sequence_length, level=logging.WARNING,
        )  # fmt: skip
    return data


def describe_head(
    task: Task, labels: Sequence[str], architecture: DebertaConfig, pooling: Pooling, config: FinetuneConfig
) -> HeadFacts:
    """The head that the task needs, and what has to be known to use it."""
    from deberta_xl.checkpoint.head_facts import HeadFacts

    chosen = config.model.head_dropout
    num_labels = len(labels) if task.has_classes else 2 if task.head == "span" else 1
    dropout = architecture.hidden_dropout if chosen is None else chosen
    head = HeadConfig(kind=task.head, num_labels=num_labels, dropout=dropout)
    if head.is_pooled:
        head = dataclasses.replace(head, **pooling._asdict())
    lengths = config.model.sequence_length, config.model.document_stride
    return HeadFacts(head, list(labels), task, *lengths, config.sift.normalizes_twice)


def weights_of_classes(task: Task, head: HeadFacts, data: TaskData, config: FinetuneConfig) -> np.ndarray | None:
    """What `train.class_weights` asks for."""
    if config.train.class_weights == "none":
        return None
    return class_weights(task, head.head.num_labels, data.examples)


def fingerprints_of(
    architecture: DebertaConfig, head: HeadFacts, examples: Sequence[Example], tokenizer: Tokenizer,
    config: FinetuneConfig,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint must agree with to be continued."""
    from deberta_xl.checkpoint.initial_weights import computed_by

    return {
        "architecture": computed_by(architecture),
        "task": {
            "kind": head.head.kind,
            "labels": head.labels,
            "document_stride": head.document_stride if head.head.kind == "span" else None,
            "normalized_twice": head.normalized_twice,
        },
        "sequence_length": config.model.sequence_length,
        "data": hashlib.sha256(repr(examples).encode("utf-8", "surrogatepass")).hexdigest(),
        "tokenizer": tokenizer.fingerprint,
    }
