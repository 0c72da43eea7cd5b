"""A task's files as examples, by what its TOML file says of their columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from deberta_xl.base.log import rank_zero
from deberta_xl.tasks.formats import FORMATS, as_text
from deberta_xl.tasks.label_names import is_missing
from deberta_xl.tasks.records import Record, TaskDataError, read_records
from deberta_xl.tasks.task import PAIR_FORMATS, Example, Source, Task
from deberta_xl.tasks.word_lines import read_words

LABELLED = ("train", "valid")
"""Splits whose labels must be there."""
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON can write and no tokenizer can read."""


def splits_of(task: Task, folder: Path) -> list[str]:
    """The splits whose files are there."""
    names = dict.fromkeys(name for source in task.sources for name in source.files)
    return [name for name in names if any(source.paths(folder, name) for source in task.sources)]


def read_split(task: Task, folder: Path, split: str) -> list[Example]:
    """The examples of a split, labels still as names. Raises TaskDataError when there are none, or they do not fit."""
    for source in task.sources:
        if paths := source.paths(folder, split):
            examples = list(examples_of(task, source, paths, split))
            if not examples:
                raise TaskDataError(f"{', '.join(map(str, paths))}: the {split} split is empty")
            return examples
    if not folder.is_dir():
        raise TaskDataError(f"{folder} is not a folder; give the one with the files of {task.name} by --data")
    wanted = "; or ".join(str(source.files[split]) for source in task.sources if split in source.files)
    raise TaskDataError(f"{folder} has no {split} file of task {task.name}; looked for: {wanted or 'nothing'}")


def examples_of(task: Task, source: Source, paths: list[Path], split: str) -> Iterator[Example]:
    """Examples of several files; those with labels to be skipped are counted."""
    reader = ExampleReader(task, source, needs_label=split in LABELLED)
    number = skipped = 0
    for path in paths:
        for record in records_of(source, path):
            example = reader.read(record, number)
            if isinstance(example.label, str) and example.label in source.skipped_labels:
                skipped += 1
                continue
            yield example
            number += 1
    if skipped:
        rank_zero("%s: left out %d examples labelled %s", split, skipped, ", ".join(map(repr, source.skipped_labels)))


def records_of(source: Source, path: Path) -> Iterator[Record]:
    """The records of a file. Raises TaskDataError when it is not in its format."""
    if source.format == "auto":
        yield from read_records(path, source.header, skips_broken=source.skips_broken_rows)
        return
    try:
        yield from read_words(path, source) if source.format == "conll" else FORMATS[source.format](path)
    except TaskDataError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise TaskDataError(f"{path} is not in the format {source.format!r}: {error!r}") from error


class ExampleReader:
    """Turns records of a source into examples."""

    def __init__(self, task: Task, source: Source, *, needs_label: bool = False):
        self.task, self.source, self.needs_label = task, source, needs_label

    def read(self, record: Record, number: int) -> Example:
        """One example; labels are names still (see `encode_labels`)."""
        fields = record.fields
        name = fields.get(self.source.id or "id")
        return Example(
            id=whole_characters(as_text(name)) if name is not None else str(number),
            texts=self.texts(record),
            label=self.label(record),
            group=as_text(fields.get("group", "")),
            value=as_text(fields.get("value", "")),
            gold=tuple(fields.get("answers") or ()) if self.source.format == "record" else (),
        )

    def column(self, record: Record, name: str) -> Any:
        """A column's value. Raises TaskDataError listing the columns there are."""
        if name not in record.fields:
            there = ", ".join(map(str, record.fields))
            raise TaskDataError(f"{record.place}: no column {name!r} (task {self.task.name}); there are: {there}")
        return record.fields[name]

    def text(self, record: Record, name: str) -> str:
        """A column's text."""
        value = self.column(record, name)
        if not isinstance(value, str):
            raise TaskDataError(f"{record.place}: column {name!r} holds {value!r}, a text is expected")
        return whole_characters(value)

    def texts(self, record: Record) -> tuple[str, ...]:
        """The texts of an example, by the kind of task."""
        source = self.source
        if self.task.head == "token":
            words = self.column(record, source.first or "words")
            words = words if isinstance(words, (list, tuple)) else str(words).split()
            return tuple(whole_characters(str(word)) for word in words)
        first, second = source.first or self.default("first"), source.second or self.default("second")
        texts = [self.text(record, first)] + ([self.text(record, second)] if second else [])
        if self.task.head == "choice":
            context, *question = texts
            return (" ".join([context, *question]), *self.options(record))
        return tuple(texts)

    def default(self, which: str) -> str | None:
        """The column that a benchmark's own format fills."""
        names = {"squad": ("context", "question"), "copa": ("context", None), "copa_xml": ("context", None)}
        names |= {"race": ("context", "question")} | dict.fromkeys(PAIR_FORMATS, ("first", "second"))
        pair = names.get(self.source.format, ("text", None))
        return pair[0] if which == "first" else pair[1]

    def options(self, record: Record) -> list[str]:
        """The options of a choice."""
        chosen = self.source.options or "options"
        options = self.column(record, chosen) if isinstance(chosen, str) else [self.text(record, c) for c in chosen]
        if not isinstance(options, (list, tuple)) or len(options) < 2:
            raise TaskDataError(f"{record.place}: {options!r} is no list of two options or more")
        return [whole_characters(str(option)) for option in options]

    def label(self, record: Record) -> Any:
        """The label, in names or numbers; None where the file has none."""
        head = self.task.head
        name = self.source.label or {"token": "tags", "span": "answers"}.get(head, "label")
        is_stated = self.source.label is not None or (self.source.format == "auto" and head != "span")
        is_required = self.needs_label and is_stated
        value = self.column(record, name) if is_required else record.fields.get(name)
        if value is None or as_text(value) in self.source.secret_labels:
            return None
        if head == "span":
            return self.answers(record, value)
        if head == "token":
            return self.tags(record, value)
        if head == "multi_label":
            return self.topics(record, value)
        if is_missing(value) and not (head == "regression" and isinstance(value, float)):
            return None
        return self.number(record, name, value) if head in ("regression", "choice") else self.name_of(record, value)

    def tags(self, record: Record, value: Any) -> tuple[str, ...] | None:
        """A tag for each word; None where one is not told."""
        parts = value if isinstance(value, (list, tuple)) else () if is_missing(value) else str(value).split()
        if any(map(is_missing, parts)) or (not parts and is_missing(value)):
            return None
        tags = tuple(self.name_of(record, part) for part in parts)
        words = len(self.texts(record))
        if len(tags) != words:
            raise TaskDataError(f"{record.place}: {words} words, but {len(tags)} tags")
        return tags

    def topics(self, record: Record, value: Any) -> tuple[str, ...] | None:
        """Several labels, or none: an empty list or text; None where they are not told (NaN)."""
        if isinstance(value, (list, tuple)):
            if missing := [part for part in value if is_missing(part)]:
                raise TaskDataError(f"{record.place}: {missing[0]!r} among the labels {value!r} is none; leave it out")
            return tuple(self.name_of(record, part) for part in value)
        if isinstance(value, float) and is_missing(value):
            return None
        parts = value.split(self.source.separator) if isinstance(value, str) else [value]
        return tuple(self.name_of(record, part) for part in parts if not is_missing(part))

    def name_of(self, record: Record, value: Any) -> str:
        """The task's name of a label. Raises TaskDataError for a list, an object, bytes, …"""
        if not isinstance(value, (str, bool, int, float, Decimal)):
            raise TaskDataError(
                f"{record.place}: the label {value!r} is a {type(value).__name__}; a text, a number or a truth value "
                "is expected (several labels of an example are for the head multi_label)"
            )
        text = whole_characters(as_text(value).strip())
        return self.source.label_names.get(text, text)

    def number(self, record: Record, name: str, value: Any) -> float:
        """A label that is a number."""
        text = self.name_of(record, value)
        try:
            number = float(text if "_" not in text else "no number")  # Python's 1_000 is nobody's
        except ValueError:
            raise TaskDataError(f"{record.place}: column {name!r} holds {value!r}, a number is expected") from None
        if number != number or abs(number) == float("inf"):
            raise TaskDataError(f"{record.place}: column {name!r} holds {value!r}, a finite number is expected")
        return number

    def answers(self, record: Record, value: Any) -> tuple[tuple[int, str], ...]:
        """Answers (start, text) of a span example; () where the text has none. `datasets` keeps them in two lists."""
        try:
            if isinstance(value, dict):
                value = list(zip(value["answer_start"], value["text"], strict=True))
            elif value and isinstance(value[0], dict):
                value = [(answer["answer_start"], answer["text"]) for answer in value]
            answers = tuple((int(start), str(text)) for start, text in value)
        except (KeyError, TypeError, ValueError):
            raise TaskDataError(
                f"{record.place}: the answers {value!r} are not understood; expected are "
                '{"answer_start": [3], "text": ["…"]} or a list of {"answer_start": 3, "text": "…"}'
            ) from None
        return () if record.fields.get("is_impossible") else answers


def whole_characters(text: str) -> str:
    """A text without halves of characters; each becomes U+FFFD."""
    return SURROGATES.sub("\ufffd", text)
