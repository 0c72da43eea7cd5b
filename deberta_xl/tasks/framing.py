"""How an example of each kind of task is framed as rows of token ids, and how what is too long is cut.

one text      [CLS] first [SEP]
two texts     [CLS] first [SEP] second [SEP]     the longer one loses its last token until both fit
choice        a row of two texts per option: context, option
token         [CLS] pieces of the words [SEP]    the first piece of a word carries its label; later words are cut
span          [CLS] question [SEP] window of the context [SEP]    as many overlapping windows as it takes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.tasks.task import Example, Task


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
