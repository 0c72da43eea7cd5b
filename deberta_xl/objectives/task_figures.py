"""Pictures of a fine-tuned model: which classes it confuses, how sure it may be, how its metrics went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from deberta_xl.run.figure_text import Picture, names_for
from deberta_xl.run.figures import draw_over_steps, name_both_axes, new_figure
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.task import Example, Task

CALIBRATION_BINS = 10
SHOWN_CLASSES = 40
"""Classes that the confusion picture shows: the most frequent ones."""
COUNTED_CLASSES = 20
"""Up to so many classes, numbers are written into its cells."""


def task_figures(
    task: Task, labels: Sequence[str], examples: Sequence[Example], found: Sequence[Prediction]
) -> dict[str, Picture]:
    """The figures that a kind of task has, by name."""
    if task.head == "classification":
        pairs = [(example.label, p.value) for example, p in zip(examples, found, strict=True)]
        return {
            "confusion": class_confusion(labels, pairs),
            "calibration": Picture(calibration(*confidences(examples, found))),
        }
    if task.head == "token":
        pairs = [
            pair
            for example, p in zip(examples, found, strict=True)
            for pair in zip(example.label, p.value, strict=True)
        ]
        return {"confusion": class_confusion(labels, pairs)}
    if task.head == "choice":
        return {"calibration": Picture(calibration(*confidences(examples, found)))}
    if task.head == "regression":
        return {"scatter": Picture(scatter([e.label for e in examples], [p.value for p in found]))}
    return {}


def confidences(examples: Sequence[Example], found: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class, and whether it is right."""
    sure = np.array([prediction.scores.max() for prediction in found])
    right = np.array([e.label == p.value for e, p in zip(examples, found, strict=True)])
    return sure, right


def class_confusion(labels: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Picture:
    """Rows are the truth; numbers are counts, colours shares of the row. The most frequent classes, where many are."""
    counts = np.zeros((len(labels), len(labels)), int)
    for gold, value in pairs:
        counts[gold, value] += 1
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    shown = np.sort(np.argsort(-counts.sum(1), kind="stable")[:SHOWN_CLASSES])
    counts, shares, names = counts[np.ix_(shown, shown)], shares[np.ix_(shown, shown)], [labels[n] for n in shown]
    size = min(12.0, 3 + 0.6 * len(shown))
    figure = new_figure(size + 1, size)
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    drawn = names_for(names)
    name_both_axes(axes, drawn)
    axes.set(xlabel="predicted", ylabel="true")
    if len(shown) < len(labels):
        axes.set_title(f"the {len(shown)} most frequent of {len(labels)} classes")
    for (row, column), count in np.ndenumerate(counts) if len(shown) <= COUNTED_CLASSES else ():
        axes.text(column, row, count, ha="center", va="center", color="black" if shares[row, column] > 0.6 else "white")
    figure.colorbar(image, label="share of the row")
    return Picture(figure, drawn.legend)


def calibration_error(sure: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over ten bins, weighted by their size."""
    bins = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    return float(sum(gaps))


def calibration(sure: np.ndarray, right: np.ndarray) -> Figure:
    """Accuracy over confidence, beside the diagonal of a model that is as often right as it is sure."""
    bins = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    used = np.unique(bins)
    figure = new_figure(5, 4.5)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    axes.bar(
        [sure[bins == b].mean() for b in used],
        [right[bins == b].mean() for b in used],
        width=0.06,
        alpha=0.8,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_title(f"expected calibration error {calibration_error(sure, right):.3f}")
    return figure


def scatter(gold: Sequence[float], values: Sequence[float]) -> Figure:
    """Predicted over true numbers."""
    figure = new_figure(5, 4.5)
    axes = figure.subplots()
    axes.scatter(gold, values, s=6, alpha=0.5)
    axes.set(xlabel="true", ylabel="predicted")
    axes.grid(alpha=0.3)
    return figure


def metric_curves(lines: Sequence[Mapping[str, float]], names: Sequence[str]) -> Figure:
    """The training losses, and the held-out metrics of these names, over steps, from the lines of metrics.jsonl."""
    figure = new_figure(9, 4)
    loss_axes, metric_axes = figure.subplots(1, 2)
    draw_over_steps(loss_axes, lines, {name: {"label": name} for name in ("task_loss", "adversarial_loss")})
    keys = [f"valid_{name}" for name in names]
    draw_over_steps(metric_axes, lines, {key: {"label": key, "marker": "o"} for key in keys})
    for axes in figure.axes:
        if axes.lines:
            axes.legend()
    return figure
