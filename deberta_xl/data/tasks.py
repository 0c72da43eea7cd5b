"""Tasks: what a small TOML file says about one, and its files as examples.

The built-in tasks are such files (configs/tasks/*.toml); a user's own is read in the same way. docs/finetuning.md
describes the keys.
"""

from __future__ import annotations

import dataclasses
import glob
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from deberta_xl.architecture import HeadKind
from deberta_xl.config_file import nearest
from deberta_xl.data.records import Record, TaskDataError, read_records
from deberta_xl.data.task_formats import FORMATS, as_text
from deberta_xl.errors import ConfigError
from deberta_xl.strict import frozen

BUILT_IN = Path(__file__).parent.parent / "configs" / "tasks"
Format = Literal[
    "auto", "label_first", "squad", "conll", "copa_xml", "copa", "wic", "wsc", "multirc", "record", "race"
]  # fmt: skip
Metric = Literal[
    "accuracy", "matthews", "f1", "macro_f1", "micro_f1", "exact_match", "pearson", "spearman", "pearson_spearman",
    "mean_squared_error", "span_f1", "squad_f1", "squad_exact_match", "group_exact_match", "record_f1", "record_em",
]  # fmt: skip


@frozen
class Source:
    """One layout in which a task's files are found; the first whose file is there is read."""

    files: dict[str, str | list[str]]
    """Split (train, valid, test, or a further held-out one) -> file below the data folder, pattern, or a list."""
    format: Format = "auto"
    """A benchmark's own layout; `auto` goes by the suffix and needs the columns below."""
    header: list[str] | None = None
    """Names of the columns of a table without header."""
    first: str | None = None
    """Column of the (first) text; for choice and span, of the context."""
    second: str | None = None
    """Column of the second text; of the question for span, and where choice has one."""
    label: str | None = None
    """Column of the label (of several labels for multi_label: a list, or text separated by `separator`)."""
    options: list[str] | str | None = None
    """choice: the columns of the options, or the column that holds their list."""
    id: str | None = None
    """Column that names an example in predictions; its number in the file when unset."""
    separator: str = ","
    """Between the labels of a multi_label example written as text."""
    label_names: dict[str, str] = Field(default_factory=dict)
    """What the file writes -> the task's label."""

    def paths(self, folder: Path, split: str) -> list[Path]:
        """The files of a split, [] when they are not there."""
        patterns = self.files.get(split, [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [[Path(p) for p in sorted(glob.glob(str(folder / pattern), recursive=True))] for pattern in patterns]
        return [path for paths in found for path in paths] if all(found) else []


@frozen
class Submission:
    """How predictions are written for the benchmark."""

    format: Literal["glue", "superglue", "multirc", "record", "squad", "conll", "jsonl"] = "jsonl"
    """Layout of the file."""
    file: str = "predictions.jsonl"
    """Its name; each split has a folder of its own."""
    label_names: dict[str, str] = Field(default_factory=dict)
    """The task's label -> what the benchmark wants."""


@frozen
class Task:
    """A task."""

    name: str
    """The file's name, without suffix."""
    head: HeadKind
    """What is predicted."""
    metrics: list[Metric]
    """The first one chooses the best checkpoint."""
    labels: list[str] | None = None
    """All labels, in the order of the model's classes; those of the training files, sorted, when unset."""
    allows_no_answer: bool = False
    """span: whether a question may have no answer in its text."""
    sources: list[Source]
    """Where examples come from."""
    submission: Submission = Field(default_factory=Submission)
    """Layout of predictions."""

    def __post_init__(self) -> None:
        if not self.metrics or not self.sources:
            raise ConfigError("metrics and sources need at least one entry each")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"labels={self.labels} names a label twice")

    @property
    def has_classes(self) -> bool:
        """Whether labels are names out of a list."""
        return self.head in ("classification", "multi_label", "token")


class Example(NamedTuple):
    """One thing to predict."""

    id: str
    texts: tuple[str, ...]
    """One text or two; context and options (choice); context and question (span); the words (token)."""
    label: Any = None
    """Class, option, number, tuple of zeros and ones, tuple of tags, or tuple of (start, text); None when unknown."""
    group: str = ""
    """What is scored together (a question's answers)."""
    value: str = ""
    """What the example stands for in its group."""
    gold: tuple[str, ...] = ()
    """The right values of the group, where the benchmark scores texts."""


def task_names() -> list[str]:
    """The built-in tasks."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def load_task(name: str) -> Task:
    """A built-in task, or the one a TOML file describes. Raises ConfigError naming file and key."""
    path = Path(name) if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"task {name}: no such task or file; {nearest(name, task_names())}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return build_task(tree, path)


def build_task(tree: dict[str, Any], path: Path) -> Task:
    """A task from the contents of its file."""
    try:
        refuse_unknown_keys(tree, Task)
        sources = [read_section(source, Source) for source in tree.get("sources", [])]
        submission = read_section(tree.get("submission", {}), Submission)
        return Task(**tree | {"name": path.stem, "sources": sources, "submission": submission})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def refuse_unknown_keys(tree: dict[str, Any], kind: type) -> None:
    """Refuse a mistyped key, with the nearest valid one."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in tree:
        if key not in known:
            raise ConfigError(f"unknown key {key}; {nearest(key, known)}")


def read_section(tree: Any, kind: type) -> Any:
    """A source or a submission."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{kind.__name__.lower()} is a table of keys, not {tree!r}")
    refuse_unknown_keys(tree, kind)
    return kind(**tree)


def splits_of(task: Task, folder: Path) -> list[str]:
    """The splits whose files are there."""
    names = dict.fromkeys(name for source in task.sources for name in source.files)
    return [name for name in names if any(source.paths(folder, name) for source in task.sources)]


def read_split(task: Task, folder: Path, split: str) -> list[Example]:
    """The examples of a split, labels still as names. Raises TaskDataError when there are none, or they do not fit."""
    for source in task.sources:
        if paths := source.paths(folder, split):
            examples = list(examples_of(task, source, paths))
            if not examples:
                raise TaskDataError(f"{', '.join(map(str, paths))}: the {split} split is empty")
            return examples
    if not folder.is_dir():
        raise TaskDataError(f"{folder} is not a folder; give the one with the files of {task.name} by --data")
    wanted = "; or ".join(str(source.files[split]) for source in task.sources if split in source.files)
    raise TaskDataError(f"{folder} has no {split} file of task {task.name}; looked for: {wanted or 'nothing'}")


def examples_of(task: Task, source: Source, paths: list[Path]) -> Iterator[Example]:
    """Examples of several files."""
    number = 0
    for path in paths:
        records = read_records(path, source.header) if source.format == "auto" else FORMATS[source.format](path)
        for record in records:
            yield ExampleReader(task, source).read(record, number)
            number += 1


class ExampleReader:
    """Turns records of a source into examples."""

    def __init__(self, task: Task, source: Source):
        self.task, self.source = task, source

    def read(self, record: Record, number: int) -> Example:
        """One example; labels are names still (see `encode_labels`)."""
        fields = record.fields
        name = fields.get(self.source.id or "id")
        return Example(
            id=as_text(name) if name is not None else str(number),
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
        return value

    def texts(self, record: Record) -> tuple[str, ...]:
        """The texts of an example, by the kind of task."""
        source = self.source
        if self.task.head == "token":
            words = self.column(record, source.first or "words")
            return tuple(map(str, words if isinstance(words, (list, tuple)) else str(words).split()))
        first, second = source.first or self.default("first"), source.second or self.default("second")
        texts = [self.text(record, first)] + ([self.text(record, second)] if second else [])
        if self.task.head == "choice":
            context, *question = texts
            return (" ".join([context, *question]), *self.options(record))
        return tuple(texts)

    def default(self, which: str) -> str | None:
        """The column that a benchmark's own format fills."""
        names = {"squad": ("context", "question"), "copa": ("context", None), "copa_xml": ("context", None)}
        names |= {"race": ("context", "question"), "label_first": ("text", None)}
        pair = names.get(self.source.format, ("first", "second") if self.source.format != "auto" else ("text", None))
        return pair[0] if which == "first" else pair[1]

    def options(self, record: Record) -> list[str]:
        """The options of a choice."""
        chosen = self.source.options or "options"
        options = self.column(record, chosen) if isinstance(chosen, str) else [self.text(record, c) for c in chosen]
        if not isinstance(options, (list, tuple)) or len(options) < 2:
            raise TaskDataError(f"{record.place}: {options!r} is no list of two options or more")
        return list(map(str, options))

    def label(self, record: Record) -> Any:
        """The label, in names or numbers; None where the file has none."""
        head = self.task.head
        name = self.source.label or {"token": "tags", "span": "answers"}.get(head, "label")
        value = record.fields.get(name)
        if value is None or value == "":
            return None
        if head == "span":
            return self.answers(record, value)
        if head == "token":
            tags = tuple(map(self.name_of, value if isinstance(value, (list, tuple)) else str(value).split()))
            words = len(self.texts(record))
            if len(tags) != words:
                raise TaskDataError(f"{record.place}: {words} words, but {len(tags)} tags")
            return tags
        if head == "multi_label":
            parts = value if isinstance(value, (list, tuple)) else str(value).split(self.source.separator)
            return tuple(self.name_of(part) for part in parts if as_text(part).strip())
        if head in ("regression", "choice"):
            return self.number(record, name, value)
        return self.name_of(value)

    def name_of(self, value: Any) -> str:
        """The task's name of a label."""
        text = as_text(value).strip()
        return self.source.label_names.get(text, text)

    def number(self, record: Record, name: str, value: Any) -> float:
        """A label that is a number."""
        try:
            number = float(self.name_of(value))
        except ValueError:
            raise TaskDataError(f"{record.place}: column {name!r} holds {value!r}, a number is expected") from None
        if number != number or abs(number) == float("inf"):
            raise TaskDataError(f"{record.place}: column {name!r} holds {value!r}, a finite number is expected")
        return number

    def answers(self, record: Record, value: Any) -> tuple[tuple[int, str], ...]:
        """Answers (start, text) of a span example; () where the text has none. `datasets` keeps them in two lists."""
        if isinstance(value, dict):
            value = list(zip(value["answer_start"], value["text"], strict=True))
        elif value and isinstance(value[0], dict):
            value = [(answer["answer_start"], answer["text"]) for answer in value]
        return () if record.fields.get("is_impossible") else tuple((int(start), str(text)) for start, text in value)
