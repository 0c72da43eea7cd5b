"""Tasks: what a small TOML file says about one.

The built-in tasks are such files (configs/tasks/*.toml); a user's own is read in the same way. docs/finetuning.md
describes the keys.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import frozen
from deberta_xl.settings.architecture import HeadKind
from deberta_xl.settings.files import read_toml
from deberta_xl.settings.presets import nearest
from deberta_xl.tasks.label_names import in_plain_sight

BUILT_IN = Path(__file__).parent.parent / "configs" / "tasks"
Format = Literal[
    "auto", "label_first", "squad", "conll", "copa_xml", "copa", "wic", "wsc", "multirc", "record", "race"
]  # fmt: skip
Metric = Literal[
    "accuracy", "matthews", "f1", "macro_f1", "micro_f1", "exact_match", "pearson", "spearman", "pearson_spearman",
    "mean_squared_error", "span_f1", "squad_f1", "squad_exact_match", "group_exact_match", "record_f1", "record_em",
]  # fmt: skip

PAIR_FORMATS = ("wic", "wsc", "multirc", "record")
"""Formats of `first` and `second` texts."""
METRICS_OF: dict[HeadKind, tuple[Metric, ...]] = {
    "classification": (
        "accuracy", "f1", "macro_f1", "micro_f1", "matthews", "group_exact_match", "record_f1", "record_em",
    ),
    "regression": ("pearson", "spearman", "pearson_spearman", "mean_squared_error"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match"),
    "token": ("span_f1", "accuracy"),
    "span": ("squad_f1", "squad_exact_match"),
    "choice": ("accuracy",),
}  # fmt: skip
"""What can be measured of a head's predictions."""
SMALLER_IS_BETTER: tuple[Metric, ...] = ("mean_squared_error",)


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
    secret_labels: list[str] = Field(default_factory=list)
    """What the file writes where a label is not told."""
    skipped_labels: list[str] = Field(default_factory=list)
    """Examples with these labels are left out, and counted."""
    skips_broken_rows: bool = False
    """Leave out, and count, rows of a table with too many or too few columns, instead of refusing the file."""

    def paths(self, folder: Path, split: str) -> list[Path]:
        """The files of a split, [] when they are not there."""
        patterns = self.files.get(split, [])
        patterns = [os.path.expanduser(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
        found = [sorted(glob.glob(pattern, root_dir=folder, recursive=True)) for pattern in patterns]
        return [folder / name for names in found for name in names] if all(found) else []


@frozen
class Submission:
    """How predictions are written for the benchmark."""

    format: Literal["glue", "superglue", "multirc", "record", "squad", "conll", "jsonl"] = "jsonl"
    """Layout of the file."""
    file: str | dict[str, str] = "predictions.jsonl"
    """Its name, or the name for each split."""
    label_names: dict[str, str] = Field(default_factory=dict)
    """The task's label -> what the benchmark wants."""

    def file_of(self, split: str) -> str:
        """The file's name for a split."""
        return self.file if isinstance(self.file, str) else self.file.get(split, f"{split}.txt")


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
        for metric in self.metrics:
            if metric not in METRICS_OF[self.head]:
                raise ConfigError(f"metric {metric} is not for head {self.head}; choose of {METRICS_OF[self.head]}")
        plain = [in_plain_sight(label) for label in self.labels or ()]
        for number, label in enumerate(plain):
            if label in plain[:number] or not label:
                first, second = self.labels[plain.index(label)], self.labels[number]
                what = f"names a label twice: {first!a} and {second!a}" if label else f"has the empty label {second!a}"
                raise ConfigError(f"labels={self.labels} {what}")

    @property
    def takes_pairs(self) -> bool:
        """Whether an example is a pair of texts."""
        return any(source.second or source.format in PAIR_FORMATS for source in self.sources)

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
    path = Path(name).expanduser() if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    if not os.path.isfile(path):
        raise ConfigError(f"task {name}: no such task or file; {nearest(name, task_names())}")
    return build_task(read_toml(path), path)


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


FORM = "Example(id={!r}, texts={!r}, label={!r}, group={!r}, value={!r}, gold={!r})"
"""How an example is written to be hashed. Not to be changed with the names in our code: checkpoints hold the hash."""


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of examples in their order."""
    text = ", ".join(FORM.format(e.id, e.texts, e.label, e.group, e.value, e.gold) for e in examples)
    return hashlib.sha256(f"[{text}]".encode("utf-8", "surrogatepass")).hexdigest()
