"""Labels as numbers: a task's list of classes, and examples checked against it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from deberta_xl.base.errors import TaskDataError
from deberta_xl.base.log import rank_zero
from deberta_xl.tasks.entity_tags import scheme_of
from deberta_xl.tasks.label_names import check_distinct, check_no_missing_words, twins_of
from deberta_xl.tasks.task import Example, Task

SHOWN = 5
UNKNOWN_LABELS = ("-1", "")
"""What benchmarks write where the label is kept secret."""


def labels_of(
    task: Task, examples: Sequence[Example], held_out: Mapping[str, Sequence[Example]] | None = None
) -> list[str]:
    """The classes in the order of the model's outputs: the task's own, or those of the training examples, sorted.

    Behind them come tags of words that only `held_out` splits have, with a warning: rare ones, which a model gets wrong
    but which must count. Raises TaskDataError for labels that are none, or are one written in two ways.
    """
    if not task.has_classes:
        return []
    if task.labels is not None:
        return list(task.labels)
    counts = count_names(task, examples)
    if len(counts) < 2:
        raise TaskDataError(f"task {task.name}: the training examples have the labels {sorted(counts)}; two are needed")
    extra = {split: count_names(task, of_split) for split, of_split in (held_out or {}).items()}
    named = [name for source in task.sources for name in source.label_names.values()]
    total = sum(extra.values(), counts)
    check_no_missing_words(total, named, where=f"task {task.name}")
    check_distinct(total, where=f"task {task.name}")
    return [*sorted(counts), *unseen(task, counts, extra)]


def count_names(task: Task, examples: Sequence[Example]) -> Counter[str]:
    """How often each label comes."""
    return Counter(name for example in examples for name in names_in(task, example.label))


def unseen(task: Task, known: Collection[str], extra: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Tags of words that only held-out splits have, with a warning; none for other heads, whose splits are refused.

    Raises TaskDataError where such tags are of another scheme than the `known` ones: then all of them are.
    """
    found: dict[str, str] = {}
    for split, of_split in extra.items() if task.head == "token" and task.labels is None else ():
        for name in sorted(set(of_split) - set(known)):
            found.setdefault(name, f"{name!r} ({of_split[name]:,} words of {split})")
    if not found:
        return []
    listed = ", ".join(list(found.values())[:SHOWN]) + (" …" if len(found) > SHOWN else "")
    if "span_f1" in task.metrics and not are_of_one_scheme(sorted(known), list(found)):
        scheme = scheme_of(sorted(known)).name
        raise TaskDataError(
            f"task {task.name}: trained on tags of {scheme}, but there are {listed}: one scheme for all"
        )
    text = "task %s: no training example has the tags %s; they count, and the model cannot know them"
    rank_zero(text, task.name, listed, level=logging.WARNING)
    return list(found)


def are_of_one_scheme(known: Sequence[str], more: Sequence[str]) -> bool:
    """Whether further tags of words are written as the known ones are."""
    try:
        both = scheme_of([*known, *more])
    except TaskDataError:
        return False
    return both.name.split()[0] == scheme_of(known).name.split()[0]


def labels_to_score(task: Task, labels: Sequence[str], examples: Sequence[Example], split: str) -> list[str]:
    """A trained model's labels, and behind them the tags of words that only `examples` have, of which it is warned.

    Such that are another way of writing a label are left to `encode_labels`, which refuses them.
    """
    if task.head != "token":
        return list(labels)
    counts = count_names(task, examples)
    alike = twins_of([*labels, *sorted(set(counts) - set(labels))])
    return [*labels, *([] if alike else unseen(task, labels, {split: counts}))]


def names_in(task: Task, label: Any) -> tuple[str, ...]:
    """The names that a label consists of."""
    if label is None:
        return ()
    return (label,) if task.head == "classification" else tuple(label)


def encode_labels(task: Task, labels: Sequence[str], examples: Sequence[Example], *, where: str) -> list[Example]:
    """The examples with classes instead of names.

    Raises TaskDataError that lists unknown labels and how often they come, or a choice that is none of the options.
    """
    number = {name: index for index, name in enumerate(labels)}
    if task.has_classes:
        check_known(task, number, examples, where)
    return [example._replace(label=encode_label(task, number, example, where)) for example in examples]


def check_known(task: Task, number: dict[str, int], examples: Sequence[Example], where: str) -> None:
    """Refuse labels that the task does not have, all of them at once."""
    counts = count_names(task, examples)
    secret = UNKNOWN_LABELS if task.head == "classification" else ()
    unknown = {name: count for name, count in counts.items() if name not in number and name not in secret}
    if unknown:
        listed = ", ".join(f"{name!r} ({count} times)" for name, count in list(unknown.items())[:SHOWN])
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        alike = [twins for twins in twins_of([*number, *unknown]) if twins.second in unknown]
        hint = f" ({alike[0]})" if alike else ""
        raise TaskDataError(
            f"{where}: unknown labels {listed}{more}{hint}; task {task.name} has: {', '.join(number)}. Mend the file, "
            "or the task's labels (label_names maps what a file writes to them)"
        )


def encode_label(task: Task, number: dict[str, int], example: Example, where: str) -> Any:
    """One label as a number or numbers; None where it is not known."""
    label = example.label
    if label is None:
        return None
    if task.head == "classification":
        return number.get(label)
    if task.head == "multi_label":
        return tuple(float(name in label) for name in number)
    if task.head == "token":
        return tuple(number[tag] for tag in label)
    if task.head == "choice":
        num_options = len(example.texts) - 1
        if int(label) != label or not 0 <= label < num_options:
            if label == -1:
                return None
            raise TaskDataError(f"{where}, example {example.id}: option {label:g} of 0 … {num_options - 1}")
        return int(label)
    return label


def class_weights(task: Task, num_labels: int, examples: Sequence[Example]) -> np.ndarray:
    """examples / (classes · examples of the class), float32 [classes]: their mean over the examples is 1.

    For multi_label the weight of a label's ones: its zeros / its ones. Raises TaskDataError for an unused class; of
    tags of words, which only held-out splits may have, the used ones are weighed.
    """
    if task.head == "multi_label":
        ones = np.sum([example.label for example in examples], axis=0)
        weights = (len(examples) - ones) / np.maximum(ones, 1)
    else:
        classes = [c for e in examples for c in (e.label if task.head == "token" else (e.label,))]
        ones = np.bincount(classes, minlength=num_labels)
        num_used = np.count_nonzero(ones) if task.head == "token" else num_labels
        weights = np.where(ones, len(classes) / (num_used * np.maximum(ones, 1)), 1.0)
    if not np.all(ones) and task.head != "token":
        raise TaskDataError(
            f"task {task.name}: no training example has class {int(np.argmin(ones))}; train.class_weights=none"
        )
    return weights.astype(np.float32)
