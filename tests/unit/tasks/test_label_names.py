"""Labels that are none, and labels that are one, written in two ways."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deberta_xl.base.errors import ConfigError, TaskDataError
from deberta_xl.tasks.label_names import is_missing, twins_of
from deberta_xl.tasks.labels import encode_labels, labels_of
from deberta_xl.tasks.reading import read_split
from deberta_xl.tasks.task import METRICS_OF, Example, Source, Task


def task_of(head: str = "classification", **options: Any) -> Task:
    """A task of lines of JSON."""
    source = Source(files={"train": "train.jsonl"}, label="label", first="words" if head == "token" else "text")
    return Task(name="t", head=head, metrics=[METRICS_OF[head][0]], sources=[source], **options)


def labels_in(folder: Path, task: Task, *values: Any) -> list[Any]:
    """The labels of a file that writes these values."""
    rows = [{"text": "x", "words": ["x"], "label": value} for value in values]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [example.label for example in read_split(task, folder, "train")]


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ("café", "cafe\u0301", "their Unicode form"),
        ("ｇｏｏｄ", "good", "their Unicode form"),
        ("good", "go\u200bod", "nobody sees"),
        ("good", "good\ufeff", "nobody sees"),
        ("very good", "very\u00a0 good", "nobody sees"),
        ("❤", "❤\ufe0f", "nobody sees"),
        ("Good", "good", "capital letters"),
        ("STRASSE", "straße", "capital letters"),
        ("1", "1.0", "a number or truth value is written"),
        ("true", "True", "capital letters"),
        ("true", "1", "a number or truth value is written"),
    ],
)
def test_a_label_written_in_two_ways_is_refused_and_never_two_classes(first, second, difference):
    examples = [Example(str(n), ("x",), label) for n, label in enumerate((first, second, second))]
    with pytest.raises(TaskDataError, match=f"{difference}.* come [12] and [12] times"):
        labels_of(task_of(), examples)
    listed = task_of(labels=[first, "other"])
    with pytest.raises(TaskDataError, match=f"unknown labels .*{difference}"):
        encode_labels(listed, listed.labels, examples, where="here")


def test_labels_that_differ_for_a_reader_are_several():
    flags = ["\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4"]
    assert twins_of(["1.1", "1.10", "7", "007", "-1", "1", "a", "b", "会話", "地の文", *flags]) == []


def test_a_list_of_labels_names_each_once():
    for twice in (["é", "e\u0301"], ["a", "a\u200b"], ["a", "a"]):
        with pytest.raises(ConfigError, match="names a label twice"):
            task_of(labels=twice)
    assert task_of(labels=["A", "a"]).labels == ["A", "a"]


@pytest.mark.parametrize("word", ["NaN", "nan", "None", "null", "N/A", "?"])
def test_words_for_missing_values_are_no_class_unless_the_task_says_so(word):
    examples = [Example(str(n), ("x",), label) for n, label in enumerate(("a", "b", word))]
    with pytest.raises(TaskDataError, match=re.escape(f"{word!r} (1 times) look like values that are missing")):
        labels_of(task_of(), examples)
    listed = task_of(labels=["a", "b", word])
    assert labels_of(listed, examples) == ["a", "b", word]


def test_values_without_anything_to_see_are_no_label(tmp_path):
    values = labels_in(tmp_path, task_of(), "a", float("nan"), None, "", "  ", "\u200b", "\ufeff\u00a0")
    assert values == ["a", None, None, None, None, None, None]
    assert is_missing(float("nan"))
    assert not is_missing(0)
    assert labels_in(tmp_path, task_of("token"), ["A"], [None], [float("nan")], [""], ["\u200b"]) == [
        ("A",), None, None, None, None,
    ]  # fmt: skip


def test_a_label_of_several_that_is_none_is_refused(tmp_path):
    task = task_of("multi_label")
    assert labels_in(tmp_path, task, ["a"], [], "a, b", "", float("nan")) == [("a",), (), ("a", "b"), (), None]
    for value in (None, float("nan"), " "):
        with pytest.raises(TaskDataError, match=r"train\.jsonl:1: .* among the labels"):
            labels_in(tmp_path, task, ["a", value])


@pytest.mark.parametrize("value", [[0, 1], {"a": 1}])
def test_a_list_or_an_object_is_no_class(tmp_path, value):
    with pytest.raises(TaskDataError, match=f"train.jsonl:1: the label .* is a {type(value).__name__}"):
        labels_in(tmp_path, task_of(), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "-inf", "1_000", True, "3,5"])
def test_a_target_that_is_no_number_is_refused_with_file_and_line(tmp_path, value):
    with pytest.raises(TaskDataError, match=r"train\.jsonl:2: column 'label' holds .* number is expected"):
        labels_in(tmp_path, task_of("regression"), 1.5, value)


def test_decimals_of_a_table_are_numbers(tmp_path):
    table = pyarrow.Table.from_pylist([{"text": "x", "label": Decimal("1.5")}])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    source = Source(files={"train": "train.parquet"}, first="text", label="label")
    task = Task(name="t", head="regression", metrics=["pearson"], sources=[source])
    assert read_split(task, tmp_path, "train")[0].label == 1.5
