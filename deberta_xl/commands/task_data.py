"""The examples of a fine-tuning run's splits, read, checked and tokenized."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import rank_zero
from deberta_xl.corpus.documents import is_held_out
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.tasks.entity_tags import scheme_of
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.labels import labels_of
from deberta_xl.tasks.metrics import check_defined
from deberta_xl.tasks.reading import read_split, splits_of
from deberta_xl.tasks.task import Example, Task

TRAIN, VALID = "train", "valid"
MANY_SHARED = 0.01
"""Share of held-out examples whose texts are trained on, above which that is said."""


def tokenize_all(
    task: Task, examples: Mapping[str, Sequence[Example]], tokenizer: Tokenizer, config: FinetuneConfig
) -> dict[str, TaskData]:
    """Every split as token ids, its labels checked. Raises UserError."""
    labels = labels_of(task, examples[TRAIN], {split: found for split, found in examples.items() if split != TRAIN})
    data = {split: tokenize(task, labels, split, found, tokenizer, config) for split, found in examples.items()}
    for split, of_split in data.items():
        if split == VALID or (split != TRAIN and of_split.is_labelled):
            check_defined(task, labels, of_split.examples, where=f"{config.task.data}, {split}")
    report_measures(task, labels, examples)
    return data


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
