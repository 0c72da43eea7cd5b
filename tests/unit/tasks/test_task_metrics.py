"""Metrics against plain formulas, predictions from logits, and submission files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from task_files import write_task

from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.labels import encode_labels, labels_of
from deberta_xl.tasks.metrics import answer_f1, check_defined, evaluate_metrics, is_better
from deberta_xl.tasks.predictions import Prediction, PredictionError, predictions_of
from deberta_xl.tasks.reading import read_split
from deberta_xl.tasks.records import TaskDataError
from deberta_xl.tasks.submission import submission
from deberta_xl.tasks.task import Example, Source, Task, load_task


def task_of(head: str, *metrics: str, **options: object) -> Task:
    """A task in memory."""
    return Task(name="t", head=head, metrics=list(metrics), sources=[Source(files={"train": "x"})], **options)


def score(task: Task, labels: list[str], gold: list, found: list) -> dict[str, float | None]:
    """Metrics of plain values."""
    examples = [Example(str(n), ("x",), label) for n, label in enumerate(gold)]
    return evaluate_metrics(task, labels, examples, [Prediction(value, None) for value in found])


def test_class_metrics_are_their_formulas():
    gold, found = [1, 1, 1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 0, 1, 0, 1]
    scores = score(task_of("classification", "accuracy", "f1", "macro_f1", "matthews"), ["0", "1"], gold, found)
    # 3 true positives, 1 false positive, 1 false negative, 3 true negatives.
    expected = {"accuracy": 6 / 8, "f1": 6 / 8, "macro_f1": 6 / 8, "matthews": (3 * 3 - 1 * 1) / 16}
    assert scores == pytest.approx(expected)


def test_correlations_and_error_are_their_formulas():
    gold, found = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0]
    names = ("pearson", "spearman", "pearson_spearman", "mean_squared_error")
    scores = score(task_of("regression", *names), [], gold, found)
    assert scores["pearson"] == pytest.approx(np.corrcoef(gold, found)[0, 1])
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert scores["pearson_spearman"] == pytest.approx((scores["pearson"] + scores["spearman"]) / 2)
    assert scores["mean_squared_error"] == pytest.approx(3 / 4)


def test_equal_predictions_leave_a_correlation_undefined_instead_of_zero():
    names = ("pearson", "spearman", "pearson_spearman")
    assert score(task_of("regression", *names), [], [1.0, 2.0], [3.0, 3.0]) == dict.fromkeys(names)
    assert score(task_of("classification", "matthews"), ["0", "1"], [0, 1], [1, 1]) == {"matthews": None}


def test_f1_of_three_labels_is_refused():
    examples = [Example("0", ("x",), 1)]
    with pytest.raises(TaskDataError, match="f1 is of two labels, the task has 3: a, b, c; measure macro_f1"):
        check_defined(task_of("classification", "f1"), list("abc"), examples, where="here")


def test_predictions_that_differ_by_rounding_alone_are_as_good_as_equal():
    found = [1.0, 1.0 + 1e-15, 1.0]
    assert score(task_of("regression", "pearson"), [], [1.0, 2.0, 4.0], found) == {"pearson": None}


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_metric_that_is_no_number_is_undefined():
    assert score(task_of("regression", "mean_squared_error"), [], [1e200], [-1e200]) == {"mean_squared_error": None}


def test_several_labels_of_which_none_comes_leave_f1_undefined():
    examples = [Example(str(n), ("x",), (0.0, 0.0)) for n in range(2)]
    with pytest.raises(TaskDataError, match="micro_f1 is not defined, since no example has a label"):
        check_defined(task_of("multi_label", "micro_f1"), ["a", "b"], examples, where="here")


def test_outputs_that_are_no_numbers_are_no_prediction(small_dataset):
    task = task_of("regression", "pearson")
    data = TaskData(
        task, [], [Example("7", ("x",), 1.0)], small_dataset.tokenizer,
        sequence_length=16, document_stride=4, is_training=False, where="here",
    )  # fmt: skip
    with pytest.raises(PredictionError, match="outputs for example 7 are not finite"):
        predictions_of(data, {0: np.array(np.nan)})


@pytest.mark.parametrize(
    ("metric", "gold", "message"),
    [
        ("matthews", [1, 1], "matthews is not defined, since every example has the label 'yes'"),
        ("f1", [0, 0], "no example has the label 'yes'"),
        ("accuracy", [0, None], "1 of 2 examples have no label"),
    ],
)
def test_data_on_which_a_metric_has_no_meaning_are_refused(metric, gold, message):
    examples = [Example(str(n), ("x",), label) for n, label in enumerate(gold)]
    with pytest.raises(TaskDataError, match=message):
        check_defined(task_of("classification", metric), ["no", "yes"], examples, where="here")


def test_whole_entities_are_scored():
    labels = ["O", "B-PER", "I-PER"]
    scores = score(task_of("token", "span_f1", "accuracy"), labels, [(1, 2, 0), (1, 0)], [(1, 2, 0), (1, 2)])
    # One of two entities is found; the other one is too long.
    assert scores == pytest.approx({"span_f1": 0.5, "accuracy": 4 / 5})


def test_answers_are_compared_as_squad_does():
    assert answer_f1("The cat!", "a cat") == 1.0
    assert answer_f1("black cat sat", "the cat") == pytest.approx(2 * 1 / 4)
    task = task_of("span", "squad_f1", "squad_exact_match")
    gold = [((0, "a list"), (3, "list of names")), ()]
    assert score(task, [], gold, ["list of", ""]) == pytest.approx(
        {"squad_f1": (0.8 + 1) / 2, "squad_exact_match": 0.5}
    )


def test_groups_are_scored_together(tmp_path):
    task = load_task("multirc")
    examples = read_split(task, write_task("multirc", tmp_path), "train")
    examples = encode_labels(task, task.labels, examples, where="here")
    found = [Prediction(value, None) for value in (1, 0, 0)]
    assert evaluate_metrics(task, task.labels, examples, found) == pytest.approx(
        {"f1": 2 / 3, "group_exact_match": 0.5}
    )
    text = submission(task, task.labels, examples, found)
    answers = [[{"idx": 0, "label": 1}, {"idx": 1, "label": 0}], [{"idx": 2, "label": 0}]]
    questions = [{"idx": n, "answers": a} for n, a in zip((1, 2), answers, strict=True)]
    assert json.loads(text) == {"idx": 7, "passage": {"questions": questions}}


def test_the_most_probable_entity_answers(tmp_path):
    task = load_task("record")
    examples = read_split(task, write_task("record", tmp_path), "train")
    examples = encode_labels(task, task.labels, examples, where="here")
    found = [Prediction(0, np.array([0.6, 0.4])), Prediction(0, np.array([0.7, 0.3]))]
    assert evaluate_metrics(task, task.labels, examples, found) == {"record_f1": 1.0, "record_em": 1.0}
    assert json.loads(submission(task, task.labels, examples, found)) == {"idx": 5, "label": "Ann"}


SUBMISSIONS = [
    ("sst2", [Prediction(1, None), Prediction(0, None)], "index\tprediction\n0\t1\n1\t0\n"),
    ("stsb", [Prediction(5.3, None)], "index\tprediction\n0\t5.000\n"),
    ("boolq", [Prediction(0, None)], '{"idx": 3, "label": "false"}\n'),
    ("copa", [Prediction(1, None)], '{"idx": 2, "label": 1}\n'),
    ("conll", [Prediction((1, 3), None), Prediction((0, 2), None)],
     "EU B-PER\nrejects O\n\nPeter B-ORG\nBlackburn I-PER\n"),
    ("squad2", [Prediction("list", None), Prediction("", None)], '{\n "a": "list",\n "b": ""\n}\n'),
    ("trec", [Prediction(5, None), Prediction(0, None)],
     '{"id": "0", "prediction": "NUM"}\n{"id": "1", "prediction": "ABBR"}\n'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "found", "text"), SUBMISSIONS, ids=[name for name, *_ in SUBMISSIONS])
def test_submissions_have_the_benchmarks_format(tmp_path, name, found, text):
    task = load_task(name)
    examples = read_split(task, write_task(name, tmp_path), "train")
    assert submission(task, labels_of(task, examples), examples, found) == text


def test_words_that_hold_a_blank_are_submitted_with_tabs():
    task = replace(load_task("conll"), labels=["B-LOC", "O"])
    examples = [Example("0", ("New York", "is"), None)]
    assert submission(task, task.labels, examples, [Prediction((0, 1), None)]) == "New York\tB-LOC\nis\tO\n"


def test_logits_over_windows_become_the_best_answer(small_dataset, tmp_path):
    task = load_task("squad2")
    examples = read_split(task, write_task("squad2", tmp_path), "train")
    data = TaskData(
        task, [], examples, small_dataset.tokenizer, sequence_length=24, document_stride=8, is_training=False, where=""
    )
    logits = {n: np.zeros((len(f.rows[0].input_ids), 2)) for n, f in enumerate(data.features)}
    number, feature = next((n, f) for n, f in enumerate(data.features) if f.label != (0, 0))
    first, last = feature.label
    logits[number][first, 0] = logits[number][last, 1] = 9.0
    for n, f in enumerate(data.features):
        if f.example == 1:
            logits[n][0] = 5.0  # [CLS] twice: no answer
    found = predictions_of(data, logits)
    assert [prediction.value for prediction in found] == ["a list of names", ""]
    assert evaluate_metrics(task, [], data.examples, found) == {"squad_f1": 1.0, "squad_exact_match": 1.0}


def test_what_is_better_depends_on_the_metric():
    assert is_better("accuracy", 0.5, None)
    assert is_better("accuracy", 0.6, 0.5)
    assert not is_better("accuracy", None, 0.5)
    assert not is_better("accuracy", None, None)
    assert is_better("mean_squared_error", 0.4, 0.5)
