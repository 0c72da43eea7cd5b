"""The tasks' metrics, by scikit-learn and scipy where they have them.

A metric that the data do not define (one class only, equal targets) is refused before training; one that the
predictions do not define (equal predictions) is None, never 0 or NaN.
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from deberta_xl.base.errors import TaskDataError
from deberta_xl.tasks.entity_tags import scheme_of
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.task import SMALLER_IS_BETTER, Example, Metric, Task

CORRELATIONS = ("pearson", "spearman", "pearson_spearman")


class Scored:
    """Right and predicted values of a split, for the metrics."""

    def __init__(self, task: Task, labels: Sequence[str], examples: Sequence[Example], found: Sequence[Prediction]):
        self.task, self.labels = task, labels
        self.examples, self.found = examples, found
        self.gold = [example.label for example in examples]
        self.values = [prediction.value for prediction in found]

    def groups(self) -> dict[str, list[int]]:
        """Group -> numbers of its examples."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, example in enumerate(self.examples):
            groups[example.group].append(number)
        return groups


def evaluate_metrics(
    task: Task, labels: Sequence[str], examples: Sequence[Example], found: Sequence[Prediction]
) -> dict[str, float | None]:
    """All metrics of the task, by name; None where the predictions leave one undefined."""
    scored = Scored(task, labels, examples, found)
    values = {name: METRICS[name](scored) for name in task.metrics}
    return {name: value if value is not None and np.isfinite(value) else None for name, value in values.items()}


def check_defined(task: Task, labels: Sequence[str], examples: Sequence[Example], *, where: str) -> None:
    """Refuse data on which a metric of the task has no meaning. Raises TaskDataError saying why."""
    gold = [example.label for example in examples]
    if any(label is None for label in gold):
        missing = sum(label is None for label in gold)
        raise TaskDataError(f"{where}: {missing} of {len(gold)} examples have no label: there is nothing to measure")
    kinds = {label for label in gold if not isinstance(label, (tuple, list))}
    for name in task.metrics:
        if name in ("matthews", *CORRELATIONS) and len(kinds) < 2:
            what = labels[next(iter(kinds))] if labels else next(iter(kinds))
            raise TaskDataError(f"{where}: {name} is not defined, since every example has the label {what!r}")
        if name == "f1" and len(labels) != 2:
            raise TaskDataError(
                f"{where}: f1 is of two labels, the task has {len(labels)}: {', '.join(labels)}; measure macro_f1"
            )
        if name == "f1" and 1 not in kinds:
            raise TaskDataError(f"{where}: f1 is not defined, since no example has the label {labels[1]!r}")
        if name == "span_f1" and not any(map(scheme_of(labels).entities, ([labels[t] for t in tags] for tags in gold))):
            raise TaskDataError(f"{where}: span_f1 is not defined, since no word is part of an entity")
        if name in ("micro_f1", "macro_f1") and task.head == "multi_label" and not any(map(any, gold)):
            raise TaskDataError(f"{where}: {name} is not defined, since no example has a label")


def is_better(metric: Metric, value: float | None, best: float | None) -> bool:
    """Whether a value beats the best one so far; None, and what is not a finite number, beats nothing."""
    if value is None or not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    return value < best if metric in SMALLER_IS_BETTER else value > best


def correlation(function: Callable[..., tuple[float, float]]) -> Callable[[Scored], float | None]:
    """A correlation of scipy's; None for constant predictions."""

    def metric(scored: Scored) -> float | None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", stats.DegenerateDataWarning)
            try:
                value = float(function(scored.gold, scored.values)[0])
            except stats.DegenerateDataWarning:  # equal, or equal but for rounding: what is left is noise
                return None
        return value if np.isfinite(value) else None

    return metric


pearson, spearman = correlation(stats.pearsonr), correlation(stats.spearmanr)


def pearson_spearman(scored: Scored) -> float | None:
    """Their mean, GLUE's score for STS-B."""
    both = pearson(scored), spearman(scored)
    return None if None in both else sum(both) / 2


def f1_over(average: str) -> Callable[[Scored], float]:
    """scikit-learn's F1: of the second label (`binary`), or averaged over all labels."""

    def metric(scored: Scored) -> float:
        labels = None if average == "binary" or scored.task.head == "multi_label" else range(len(scored.labels))
        return float(sk.f1_score(scored.gold, scored.values, average=average, labels=labels, zero_division=0.0))

    return metric


def group_exact_match(scored: Scored) -> float:
    """Share of the groups in which every example is right (MultiRC)."""
    groups = scored.groups().values()
    return float(np.mean([all(scored.gold[n] == scored.values[n] for n in numbers) for numbers in groups]))


def best_in_group(scored: Scored) -> dict[str, int]:
    """Group -> number of the example most probably right (ReCoRD)."""
    return {group: max(numbers, key=lambda n: scored.found[n].scores[1]) for group, numbers in scored.groups().items()}


def over_answers(score: Callable[[str, str], float]) -> Callable[[Scored], float]:
    """Mean over groups of the best score against any right text (ReCoRD)."""

    def metric(scored: Scored) -> float:
        chosen = [scored.examples[number] for number in best_in_group(scored).values()]
        return float(np.mean([max((score(e.value, gold) for gold in e.gold), default=0.0) for e in chosen]))

    return metric


def over_spans(score: Callable[[str, str], float]) -> Callable[[Scored], float]:
    """Mean over questions of the best score against any right answer (SQuAD); no answer is the empty text."""

    def metric(scored: Scored) -> float:
        pairs = zip(scored.gold, scored.values, strict=True)
        return float(
            np.mean([max(score(found, g) for g in [text for _, text in gold] or [""]) for gold, found in pairs])
        )

    return metric


def normalize_answer(text: str) -> str:
    """SQuAD's: lower case, without punctuation, articles and superfluous spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_exact_match(found: str, gold: str) -> float:
    """1 for equal answers."""
    return float(normalize_answer(found) == normalize_answer(gold))


def answer_f1(found: str, gold: str) -> float:
    """F1 over the words of two answers."""
    found_words, gold_words = normalize_answer(found).split(), normalize_answer(gold).split()
    if not found_words or not gold_words:
        return float(found_words == gold_words)
    shared = sum((Counter(found_words) & Counter(gold_words)).values())
    return 2 * shared / (len(found_words) + len(gold_words))


def span_f1(scored: Scored) -> float:
    """F1 over whole entities (CoNLL)."""
    scheme = scheme_of(scored.labels)
    counts = np.zeros(3)
    for gold, found in zip(scored.gold, scored.values, strict=True):
        right, given = (scheme.entities([scored.labels[t] for t in tags]) for tags in (gold, found))
        counts += len(right & given), len(right), len(given)
    return float(2 * counts[0] / max(1, counts[1] + counts[2]))


def accuracy(scored: Scored) -> float:
    """Share of right values; over words for token tasks."""
    if scored.task.head == "token":
        pairs = [pair for g, v in zip(scored.gold, scored.values, strict=True) for pair in zip(g, v, strict=True)]
        return float(np.mean([gold == value for gold, value in pairs]))
    return float(sk.accuracy_score(scored.gold, scored.values))


METRICS: dict[Metric, Callable[[Scored], float | None]] = {
    "accuracy": accuracy,
    "matthews": lambda s: float(sk.matthews_corrcoef(s.gold, s.values)) if len(set(s.values)) > 1 else None,
    "f1": f1_over("binary"),
    "macro_f1": f1_over("macro"),
    "micro_f1": f1_over("micro"),
    "exact_match": lambda scored: float(sk.accuracy_score(scored.gold, scored.values)),
    "pearson": pearson,
    "spearman": spearman,
    "pearson_spearman": pearson_spearman,
    "mean_squared_error": lambda scored: float(sk.mean_squared_error(scored.gold, scored.values)),
    "span_f1": span_f1,
    "squad_f1": over_spans(answer_f1),
    "squad_exact_match": over_spans(answer_exact_match),
    "group_exact_match": group_exact_match,
    "record_f1": over_answers(answer_f1),
    "record_em": over_answers(answer_exact_match),
}
