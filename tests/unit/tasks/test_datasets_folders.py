"""Folders that Hugging Face's `datasets` has saved, in the columns of its hub: each built-in task reads its own."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from deberta_xl.tasks.labels import encode_labels, labels_of
from deberta_xl.tasks.reading import read_split
from deberta_xl.tasks.records import TaskDataError
from deberta_xl.tasks.task import load_task

TEXT, NUMBER = Value("string"), Value("int32")
TAGS = ["O", "B-PER", "I-PER"]
NLI = ["entailment", "neutral", "contradiction"]
ENTAILS = ClassLabel(names=["entailment", "not_entailment"])
TRUTH = ClassLabel(names=["False", "True"])
ANSWERS = {"text": List(TEXT), "answer_start": List(NUMBER)}

#: Task -> the hub's columns with their kinds and one row; then the texts and the label (a class's number) to expect.
HUB = {
    "cola": ({"sentence": TEXT, "label": ClassLabel(names=["unacceptable", "acceptable"]), "idx": NUMBER},
             ["It works.", 1, 0], ("It works.",), 1),
    "sst2": ({"sentence": TEXT, "label": ClassLabel(names=["negative", "positive"])}, ["A joy.", 1], ("A joy.",), 1),
    "mrpc": ({"sentence1": TEXT, "sentence2": TEXT, "label": ClassLabel(names=["not_equivalent", "equivalent"])},
             ["a", "b", 0], ("a", "b"), 0),
    "qqp": ({"question1": TEXT, "question2": TEXT, "label": ClassLabel(names=["not_duplicate", "duplicate"])},
            ["a?", "b?", 1], ("a?", "b?"), 1),
    "stsb": ({"sentence1": TEXT, "sentence2": TEXT, "label": Value("float32")}, ["a", "b", 2.5], ("a", "b"), 2.5),
    "mnli": ({"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=NLI)}, ["a", "b", 2], ("a", "b"), 2),
    "qnli": ({"question": TEXT, "sentence": TEXT, "label": ENTAILS},
             ["a?", "b", 1], ("a?", "b"), 1),
    "rte": ({"sentence1": TEXT, "sentence2": TEXT, "label": ENTAILS},
            ["a", "b", 0], ("a", "b"), 0),
    "wnli": ({"sentence1": TEXT, "sentence2": TEXT, "label": ClassLabel(names=["not_entailment", "entailment"])},
             ["a", "b", 1], ("a", "b"), 1),
    "boolq": ({"question": TEXT, "passage": TEXT, "label": TRUTH}, ["is it", "It is.", 1], ("It is.", "is it"), 1),
    "cb": ({"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=["entailment", "contradiction", "neutral"])},
           ["a", "b", 2], ("a", "b"), 2),
    "rte_superglue": ({"premise": TEXT, "hypothesis": TEXT, "idx": NUMBER, "label": ENTAILS},
                      ["a", "b", 7, 1], ("a", "b"), 1),
    "copa": ({"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT,
              "label": ClassLabel(names=["choice1", "choice2"])},
             ["It rained.", "Sun.", "Mud.", "effect", 1],
             ("It rained. What happened as a result?", "Sun.", "Mud."), 1),
    "wic": ({"word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "label": TRUTH}, ["bank", "a", "b", 0],
            ("bank: a", "b"), 0),
    "conll": ({"tokens": List(TEXT), "ner_tags": List(ClassLabel(names=TAGS))}, [["Ann", "Lee", "left"], [1, 2, 0]],
              ("Ann", "Lee", "left"), (0, 1, 2)),
    "swag": ({"sent1": TEXT, "sent2": TEXT, **{f"ending{n}": TEXT for n in range(4)},
              "label": ClassLabel(names=["0", "1", "2", "3"])},
             ["He sits.", "He", "a", "b", "c", "d", 3], ("He sits. He", "a", "b", "c", "d"), 3),
    "race": ({"example_id": TEXT, "article": TEXT, "answer": TEXT, "question": TEXT, "options": List(TEXT)},
             ["x", "Long.", "B", "Short?", ["a", "b", "c", "d"]], ("Long. Short?", "a", "b", "c", "d"), 1),
    "squad": ({"id": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS},
              ["x", "It is red.", "What?", {"text": ["red"], "answer_start": [6]}], ("It is red.", "What?"),
              ((6, "red"),)),
    "squad2": ({"id": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS},
               ["x", "It is red.", "Who?", {"text": [], "answer_start": []}], ("It is red.", "Who?"), ()),
}  # fmt: skip


def save(folder: Path, columns: dict, *rows: list) -> Path:
    """A split as `save_to_disk` leaves it."""
    content = {name: [row[place] for row in rows] for place, name in enumerate(columns)}
    Dataset.from_dict(content, Features(columns)).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("name", HUB)
def test_the_columns_of_the_hub_are_those_of_the_task(name, tmp_path):
    columns, row, texts, label = HUB[name]
    task = load_task(name)
    for folder in {"validation", "validation_matched"}:
        save(tmp_path / folder, columns, row)
    (example,) = read_split(task, tmp_path, "valid")
    labels = labels_of(task, [example])
    (encoded,) = encode_labels(task, labels, [example], where="here")
    assert (encoded.texts, encoded.label) == (texts, label)


@pytest.mark.parametrize("name", ["mnli", "copa", "swag", "stsb"])
def test_a_secret_label_is_none(name, tmp_path):
    columns, row, *_ = HUB[name]
    for folder in {"test", "test_matched"}:
        save(tmp_path / folder, columns, [*row[:-1], -1])
    (example,) = read_split(load_task(name), tmp_path, "test")
    assert example.label is None


def test_a_folder_of_several_splits_and_any_other_folder_are_refused(tmp_path):
    rows = Dataset.from_dict({"sentence": ["a"], "label": [1]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "validation")
    with pytest.raises(TaskDataError, match="holds several splits: train, test"):
        read_split(load_task("sst2"), tmp_path, "valid")
    (tmp_path / "train").mkdir()
    with pytest.raises(TaskDataError, match=r"is not a folder that `Dataset.save_to_disk` wrote"):
        read_split(load_task("sst2"), tmp_path, "train")


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    save(tmp_path / "train", HUB["sst2"][0], ["A joy.", 1])
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TaskDataError, match="pip install datasets"):
        read_split(load_task("sst2"), tmp_path, "train")
    assert datasets.__version__
