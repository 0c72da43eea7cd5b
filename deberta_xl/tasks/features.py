"""A split of a task, tokenised: its features, what did not fit, and batches of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deberta_xl.base.log import rank_zero
from deberta_xl.base.progress import tracked
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.settings.architecture import IGNORED
from deberta_xl.settings.finetuning import PAD_MULTIPLE
from deberta_xl.tasks.framing import Feature, Framer
from deberta_xl.tasks.labels import encode_labels
from deberta_xl.tasks.records import TaskDataError
from deberta_xl.tasks.task import Example, Task

MANY_UNKNOWN = 0.01
"""Share of unknown tokens above which a tokenizer does not suit a text."""


class TaskBatch(NamedTuple):
    """Arrays for the model; rows padded to the longest, rounded up to a multiple of 8."""

    input_ids: np.ndarray
    """int64 [rows, sequence]."""
    segments: np.ndarray
    """int64 [rows, sequence], 0 at padding and 1 elsewhere."""
    token_types: np.ndarray
    """int64 [rows, sequence], 1 in the second text."""
    labels: np.ndarray
    """As `task_loss` wants them; zeros (token: −100) where they are not known."""
    num_options: int
    """Rows of one example."""


class Cuts(NamedTuple):
    """What did not fit or match, for the report."""

    truncated: int
    """Examples that lost tokens."""
    mismatched: int
    """Span examples left out of training: their answer is not in the text where it is said to be."""
    total: int
    """Examples."""
    unreached: int = 0
    """Span examples to train on whose answer no window holds."""


class TaskData:
    """A split, tokenised."""

    def __init__(
        self,
        task: Task,
        labels: Sequence[str],
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        document_stride: int,
        is_training: bool,
        where: str,
    ):
        self.task, self.labels = task, list(labels)
        self.examples = encode_labels(task, labels, examples, where=where)
        framer = Framer(task, tokenizer, sequence_length, document_stride, is_training=is_training)
        reading = tracked(self.examples, f"tokenising {where}", len(self.examples), "examples")
        self.features = [feature for number, example in enumerate(reading) for feature in framer(number, example)]
        self.lengths = np.array([feature.length for feature in self.features])
        self.check_options(where)
        unreached = self.count_unreached() if is_training and task.head == "span" else 0
        self.cuts = Cuts(framer.truncated, framer.mismatched, len(self.examples), unreached)
        ids = [row.input_ids for feature in self.features for row in feature.rows]
        num_unknown = sum(np.count_nonzero(row == tokenizer.unk_id) for row in ids)
        self.unknown_share = num_unknown / max(1, sum(np.count_nonzero(row >= tokenizer.unk_id) for row in ids))
        self.says_something = any(map(np.any, map(tokenizer.says_something.__getitem__, ids)))
        if self.unknown_share > MANY_UNKNOWN:
            text = "%s: %.1f %% of the tokens are [UNK]: the model's tokenizer lacks characters of this text"
            rank_zero(text, where, 100 * self.unknown_share, level=logging.WARNING)
        missing = sum(example.label is None for example in self.examples)
        self.check_words(where, sequence_length)
        if is_training:
            self.check_training(where)
        elif 0 < missing < len(self.examples):
            text = "%s: %d of %d examples have no label, so that nothing is measured on it"
            rank_zero(text, where, missing, len(self.examples), level=logging.WARNING)

    def check_training(self, where: str) -> None:
        """Refuse a training split that cannot be learned from."""
        if not self.features:
            raise TaskDataError(f"{where}: no answer is where its example says ({self.cuts.mismatched} examples)")
        if any(feature.label is None for feature in self.features):
            number = next(feature.example for feature in self.features if feature.label is None)
            raise TaskDataError(f"{where}: example {self.examples[number].id} has no label; training needs all of them")
        if not self.says_something:
            raise TaskDataError(
                f"{where}: all of the text is empty, or [UNK] to the model's tokenizer; start from a model that knows "
                "its script"
            )
        if self.cuts.unreached and all(feature.label == (0, 0) for feature in self.features):
            raise TaskDataError(
                f"{where}: none of {self.cuts.unreached} answers fits into a window, so that only `no answer` could be "
                "learned; give a larger model.sequence_length"
            )

    def check_words(self, where: str, sequence_length: int) -> None:
        """Refuse words with labels of which none fits."""
        labels = [feature.label for feature in self.features if feature.label is not None]
        if self.task.head == "token" and labels and not any(map(len, labels)):
            raise TaskDataError(
                f"{where}: not even the first word of any of {len(labels)} examples fits into "
                f"model.sequence_length={sequence_length}; give a larger one, or split the text into words"
            )

    def count_unreached(self) -> int:
        """Examples with an answer that no window holds."""
        framed = {feature.example for feature in self.features if self.examples[feature.example].label}
        return len(framed - {feature.example for feature in self.features if feature.label != (0, 0)})

    def check_options(self, where: str) -> None:
        """Refuse examples with more or fewer options than the first one: a batch has equally many of each."""
        for feature in self.features:
            if len(feature.rows) != len(self.features[0].rows):
                raise TaskDataError(
                    f"{where}: example {self.examples[feature.example].id} has {len(feature.rows)} options, the first "
                    f"one has {len(self.features[0].rows)}; all examples need equally many"
                )

    def __len__(self) -> int:
        """Features."""
        return len(self.features)

    @property
    def padded_lengths(self) -> np.ndarray:
        """Of each feature's rows in a batch of its own."""
        return -(-self.lengths // PAD_MULTIPLE) * PAD_MULTIPLE

    @property
    def num_options(self) -> int:
        """Rows of each feature."""
        return len(self.features[0].rows) if self.features else 1

    @property
    def is_labelled(self) -> bool:
        """Whether every example has its label."""
        return all(example.label is not None for example in self.examples)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> TaskBatch:
        """The given features."""
        chosen = [self.features[number] for number in numbers]
        rows = [row for feature in chosen for row in feature.rows]
        length = -(-max(len(row.input_ids) for row in rows) // PAD_MULTIPLE) * PAD_MULTIPLE
        ids, segments, types = np.zeros((3, len(rows), length), np.int64)
        for number, row in enumerate(rows):
            size = len(row.input_ids)
            ids[number, :size] = row.input_ids
            segments[number, :size] = 1
            types[number, row.second : size] = 1
        return TaskBatch(ids, segments, types, self.label_array(chosen, length), len(chosen[0].rows))

    def label_array(self, features: Sequence[Feature], length: int) -> np.ndarray:
        """Labels of a batch."""
        head = self.task.head
        if head == "token":
            labels = np.full((len(features), length), IGNORED, np.int64)
            for number, feature in enumerate(features):
                if feature.label is not None:
                    labels[number, feature.places] = feature.label
            return labels
        empty = {"span": (0, 0), "multi_label": (0.0,) * len(self.labels)}.get(head, 0)
        dtype = np.float32 if head in ("regression", "multi_label") else np.int64
        return np.array([empty if f.label is None else f.label for f in features], dtype)
