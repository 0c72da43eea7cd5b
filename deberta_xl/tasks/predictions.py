"""From logits to predictions, example by example."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deberta_xl.base.errors import UserError
from deberta_xl.tasks.entity_tags import outside_of
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.framing import Feature

NUM_BEST = 20
MAX_ANSWER_TOKENS = 40


class PredictionError(UserError):
    """A model's outputs say nothing."""


class Prediction(NamedTuple):
    """What a model says of one example."""

    value: Any
    """Class, option, number, tuple of zeros and ones, tuple of tags, or answer text ("" for none)."""
    scores: Any
    """Probability of each class or option (each label alone for multi_label), None for other heads."""


def predictions_of(data: TaskData, logits: Mapping[int, np.ndarray]) -> list[Prediction]:
    """Predictions of all examples, from the logits of all features by number.

    Raises PredictionError where they are not finite: the largest of them would be a class like any other.
    """
    for number, values in logits.items():
        if not np.isfinite(values).all():
            raise PredictionError(
                f"the model's outputs for example {data.examples[data.features[number].example].id} are not finite "
                "numbers: its training has diverged"
            )
    by_example: dict[int, list[int]] = defaultdict(list)
    for number, feature in enumerate(data.features):
        by_example[feature.example].append(number)
    decode = DECODERS[data.task.head]
    return [
        decode(data, example, [(data.features[n], logits[n]) for n in by_example[example]])
        for example in range(len(data.examples))
    ]


Windows = Sequence[tuple[Feature, np.ndarray]]


def decode_class(_data: TaskData, _example: int, windows: Windows) -> Prediction:
    """The largest logit."""
    ((_, logits),) = windows
    return Prediction(int(np.argmax(logits)), softmax(logits))


def decode_number(_data: TaskData, _example: int, windows: Windows) -> Prediction:
    """The output itself."""
    ((_, logits),) = windows
    return Prediction(float(logits), None)


def decode_labels(_data: TaskData, _example: int, windows: Windows) -> Prediction:
    """Every label whose probability is above one half."""
    ((_, logits),) = windows
    return Prediction(tuple(float(x > 0) for x in logits), 1 / (1 + np.exp(-logits.astype(np.float64))))


def decode_tags(data: TaskData, example: int, windows: Windows) -> Prediction:
    """A tag per word; words that were cut off are outside entities, or get the first tag where none says so."""
    ((feature, logits),) = windows
    tags = np.argmax(logits[feature.places], -1).tolist()
    name = outside_of(data.labels)
    outside = 0 if name is None else data.labels.index(name)
    missing = len(data.examples[example].texts) - len(tags)
    return Prediction(tuple([*tags, *[outside] * missing]), None)


def decode_span(data: TaskData, example: int, windows: Windows) -> Prediction:
    """The best text over all windows, or "" where "no answer" ([CLS] twice) scores higher than it in every window.

    Only tasks that have questions without answer may say so.
    """
    context = data.examples[example].texts[0]
    best: tuple[float, str] = (-np.inf, "")
    no_answer = np.inf
    for feature, logits in windows:
        score, text = best_span(feature.places, logits, context)
        best = max(best, (score, text))
        no_answer = min(no_answer, float(logits[0].sum()))
    is_missing = data.task.allows_no_answer and no_answer > best[0]
    return Prediction("" if is_missing else best[1], None)


def best_span(places: np.ndarray, logits: np.ndarray, context: str) -> tuple[float, str]:
    """Score and text of the best span within the context part of a window."""
    inside = np.flatnonzero(places[:, 0] >= 0)
    best = (-np.inf, "")
    firsts = inside[np.argsort(-logits[inside, 0], kind="stable")[:NUM_BEST]]
    lasts = inside[np.argsort(-logits[inside, 1], kind="stable")[:NUM_BEST]]
    for first in firsts:
        for last in lasts:
            score = float(logits[first, 0] + logits[last, 1])
            if first <= last < first + MAX_ANSWER_TOKENS and score > best[0]:
                best = (score, context[places[first, 0] : places[last, 1]].strip())
    return best


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return exponentials / exponentials.sum()


DECODERS = {
    "classification": decode_class,
    "choice": decode_class,
    "regression": decode_number,
    "multi_label": decode_labels,
    "token": decode_tags,
    "span": decode_span,
}
