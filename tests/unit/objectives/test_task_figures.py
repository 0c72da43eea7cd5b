"""Figures of fine-tuned models: their numbers, and one for each kind of task that has them."""

from __future__ import annotations

import numpy as np
import pytest

from deberta_xl.objectives.task_figures import calibration_error, task_figures
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.task import METRICS_OF, Example, Source, Task


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    sure = np.array([0.95, 0.95, 0.65, 0.65])
    right = np.array([True, False, True, True])
    assert calibration_error(sure, right) == pytest.approx(0.5 * (0.95 - 0.5) + 0.5 * (1 - 0.65))
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0


CASES = {
    "classification": (0, Prediction(1, np.array([0.3, 0.7])), {"confusion", "calibration"}),
    "choice": (0, Prediction(1, np.array([0.3, 0.7])), {"calibration"}),
    "token": ((0, 1), Prediction((1, 1), None), {"confusion"}),
    "regression": (2.0, Prediction(1.5, None), {"scatter"}),
    "span": (((0, "a"),), Prediction("a", None), set()),
}


@pytest.mark.parametrize("head", CASES)
def test_a_kind_of_task_has_its_figures(head):
    label, prediction, names = CASES[head]
    task = Task(name="t", head=head, metrics=[METRICS_OF[head][0]], sources=[Source(files={"train": "x"})])
    figures = task_figures(task, ["a", "b"], [Example("0", ("x",), label)], [prediction])
    assert set(figures) == names


def test_the_confusion_counts_truth_by_row():
    task = Task(name="t", head="classification", metrics=["accuracy"], sources=[Source(files={"train": "x"})])
    gold, found = [0, 0, 0, 1], [0, 1, 1, 1]
    examples = [Example(str(n), ("x",), label) for n, label in enumerate(gold)]
    predictions = [Prediction(value, np.array([0.5, 0.5])) for value in found]
    axes = task_figures(task, ["a", "b"], examples, predictions)["confusion"].figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "0", "1"]


def test_many_classes_with_any_name_make_a_picture_of_bounded_size(tmp_path):
    task = Task(name="t", head="classification", metrics=["accuracy"], sources=[Source(files={"train": "x"})])
    labels = ["$$", "_$x$", *(f"class {n}" for n in range(2000))]
    examples = [Example(str(n), ("x",), n % 60) for n in range(600)]
    predictions = [Prediction(n % 2, np.array([0.5, 0.5])) for n in range(600)]
    figure = task_figures(task, labels, examples, predictions)["confusion"].figure
    figure.savefig(tmp_path / "confusion.png")
    assert max(figure.get_size_inches()) <= 13
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == labels[:40]
    assert "40 most frequent of 2002" in figure.axes[0].get_title()
