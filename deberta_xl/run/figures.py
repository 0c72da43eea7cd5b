"""Pictures of a run: its loss curves, and the words it confuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from deberta_xl.run.figure_text import Names, Picture, names_for

CONFUSION_WORDS = 20


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_curves(lines: Sequence[Mapping[str, float]], label: str = "loss") -> Figure:
    """Training and validation loss over steps, from the lines of metrics.jsonl."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    styles = {
        "loss": {"label": "training", "linewidth": 1},
        "valid_loss": {"label": "validation", "marker": "o"},
    }
    draw_over_steps(axes, lines, styles)
    entropies = [line["valid_unigram_entropy"] for line in lines if "valid_unigram_entropy" in line]
    if entropies:
        axes.axhline(
            entropies[-1], color="grey", linestyle="--", linewidth=1, label="training unigram (reads no context)"
        )
    axes.set_ylabel(label)
    axes.legend()
    return figure


def detection_curves(lines: Sequence[Mapping[str, float]]) -> Figure:
    """Replaced token detection over steps: both losses, and F1 and area under the ROC curve."""
    figure = new_figure(8, 8)
    panels = {
        "generator's loss (nats per masked token)": ("generator_loss",),
        "discriminator's loss (nats per token)": ("discriminator_loss",),
        "found": ("f1", "auc"),
    }
    for axes, (label, names) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        styles = {name: {"label": f"{name}, training", "linewidth": 1} for name in names}
        styles |= {f"valid_{name}": {"label": f"{name}, validation", "marker": "o"} for name in names}
        draw_over_steps(axes, lines, styles)
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend()
    return figure


def draw_over_steps(axes: Axes, lines: Sequence[Mapping[str, float]], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """A curve for each key of `styles` that lines of metrics.jsonl have."""
    for name, style in styles.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def confusion_figure(label_L: Tensor, guess_L: Tensor, piece_of: Callable[[int], str]) -> Picture:
    """How often each of the most frequent masked words is taken for which: rows are the truth, shares of the row."""
    labels, guesses = label_L.numpy(), guess_L.numpy()
    words, counts = np.unique(labels, return_counts=True)
    words = words[np.argsort(-counts, kind="stable")][:CONFUSION_WORDS]
    shares = np.array([[np.mean(guesses[labels == row] == column) for column in words] for row in words])
    figure = new_figure(9, 8)
    axes = figure.subplots()
    image = axes.imshow(shares.reshape(len(words), len(words)), vmin=0, vmax=1, cmap="viridis")
    names = names_for([piece_of(int(word)) for word in words])
    name_both_axes(axes, names)
    axes.set_xlabel("best guess")
    axes.set_ylabel("masked word")
    figure.colorbar(image, label="share of the row")
    return Picture(figure, names.legend)


def name_both_axes(axes: Axes, names: Names) -> None:
    """The names at the rows and columns of a square picture."""
    # Names are shown as they are: matplotlib takes what stands between two dollars for a formula.
    look = {"fontfamily": names.families, "parse_math": False}
    axes.set_xticks(range(len(names.shown)), names.shown, rotation=90, **look)
    axes.set_yticks(range(len(names.shown)), names.shown, **look)
