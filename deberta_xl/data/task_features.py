"""Examples as token ids: how each kind of task is framed, and how what is too long is cut.

one text      [CLS] first [SEP]
two texts     [CLS] first [SEP] second [SEP]     the longer one loses its last token until both fit
choice        a row of two texts per option: context, option
token         [CLS] pieces of the words [SEP]    the first piece of a word carries its label; later words are cut
span          [CLS] question [SEP] window of the context [SEP]    as many overlapping windows as it takes
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deberta_xl.data.progress import tracked
from deberta_xl.data.records import TaskDataError
from deberta_xl.data.task_labels import encode_labels
from deberta_xl.data.tasks import Example, Task
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.finetune_config import PAD_MULTIPLE
from deberta_xl.log import rank_zero

IGNORED = -100
MANY_UNKNOWN = 0.01
"""Share of unknown tokens above which a tokenizer does not suit a text."""


class Row(NamedTuple):
    """One sequence."""

    input_ids: np.ndarray
    """int64 [length]."""
    second: int
    """Where the second text begins; the length when there is none."""


class Feature(NamedTuple):
    """What the model is given at once: an example, or a window of one."""

    example: int
    """Number of the example in its split."""
    rows: tuple[Row, ...]
    """One; for choice one for each option."""
    label: Any = None
    """As the loss wants it; None when unknown."""
    places: np.ndarray | None = None
    """token: position of each word's first piece [words kept]; span: first and behind-last character of the context
    at each position [length, 2], −1 outside it."""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)


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


class Framer:
    """Makes features of examples, and counts what had to be cut."""

    def __init__(
        self, task: Task, tokenizer: Tokenizer, sequence_length: int, document_stride: int, *, is_training: bool
    ):
        self.task, self.tokenizer = task, tokenizer
        self.limit, self.stride, self.is_training = sequence_length, document_stride, is_training
        self.truncated = self.mismatched = 0

    def __call__(self, number: int, example: Example) -> list[Feature]:
        """The features of an example: one, or a window each."""
        if self.task.head == "span":
            return self.windows(number, example)
        if self.task.head == "token":
            return [self.words(number, example)]
        if self.task.head == "choice":
            context, *options = (self.encode(text) for text in example.texts)
            fitted = [self.fit([context, option]) for option in options]
            rows = tuple(self.frame(texts) for texts, _ in fitted)
            self.truncated += any(was_cut for _, was_cut in fitted)
            return [Feature(number, rows, example.label)]
        texts, was_cut = self.fit([self.encode(text) for text in example.texts])
        self.truncated += was_cut
        return [Feature(number, (self.frame(texts),), example.label)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.tokenizer.encode(text).tolist()

    def fit(self, texts: list[list[int]]) -> tuple[list[list[int]], bool]:
        """The texts cut to the limit, and whether they had to be: the longest loses its last token, again and again."""
        excess = sum(map(len, texts)) + len(texts) + 1 - self.limit
        sizes = [len(text) for text in texts]
        for _ in range(max(0, excess)):
            sizes[int(np.argmax(sizes))] -= 1
        return [text[:size] for text, size in zip(texts, sizes, strict=True)], excess > 0

    def frame(self, texts: Sequence[Sequence[int]]) -> Row:
        """[CLS] and the texts, each followed by [SEP]."""
        ids = [self.tokenizer.cls_id]
        second = None
        for text in texts:
            second = len(ids) if len(ids) > 1 and second is None else second
            ids += [*text, self.tokenizer.sep_id]
        return Row(np.array(ids, np.int64), len(ids) if second is None else second)

    def words(self, number: int, example: Example) -> Feature:
        """A sentence whose words carry labels."""
        ids: list[int] = []
        places = []
        for word in example.texts:
            pieces = self.encode(word) or [self.tokenizer.unk_id]
            if len(ids) + len(pieces) + 2 > self.limit:
                self.truncated += 1
                break
            places.append(len(ids) + 1)
            ids += pieces
        label = None if example.label is None else np.array(example.label[: len(places)], np.int64)
        return Feature(number, (self.frame([ids]),), label, np.array(places, np.int64))

    def windows(self, number: int, example: Example) -> list[Feature]:
        """Windows over the context, each behind the question; the question may take half of the room."""
        context, question = example.texts
        if self.is_training and example.label is not None and not matches(context, example.label):
            self.mismatched += 1
            return []
        question_ids = self.encode(question)
        self.truncated += len(question_ids) > self.limit // 2
        question_ids = question_ids[: self.limit // 2]
        ids, spans = self.tokenizer.encode_with_places(context)
        room = self.limit - len(question_ids) - 3
        step = room - min(self.stride, room // 2)
        starts = range(0, max(1, len(ids) - room + step), step)
        first = len(question_ids) + 2
        features = []
        for start in starts:
            row = self.frame([question_ids, ids[start : start + room]])
            places = np.full((len(row.input_ids), 2), -1, np.int64)
            places[first:-1] = spans[start : start + room]
            label = None if example.label is None else target(places, example.label)
            features.append(Feature(number, (row,), label, places))
        return features


def matches(context: str, answers: Sequence[tuple[int, str]]) -> bool:
    """Whether every answer stands where it is said to, and says something."""
    return all(text.strip() and context[start : start + len(text)] == text for start, text in answers)


def target(places: np.ndarray, answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Positions of the first answer's first and last token, or (0, 0), [CLS], where this window does not hold it."""
    if not answers:
        return 0, 0
    start, text = answers[0]
    start, text = start + len(text) - len(text.lstrip()), text.strip()  # no token is a blank
    end = start + len(text)
    inside = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end) & (places[:, 0] >= 0))
    if not len(inside) or places[inside[0], 0] > start or places[inside[-1], 1] < end:
        return 0, 0
    return int(inside[0]), int(inside[-1])
