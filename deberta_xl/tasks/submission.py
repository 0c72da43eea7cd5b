"""Predictions in the benchmarks' submission formats, and as lines of JSON for everyone else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from deberta_xl.tasks.metrics import Scored, best_in_group
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.task import Example, Task


def submission(task: Task, labels: Sequence[str], examples: Sequence[Example], found: Sequence[Prediction]) -> str:
    """The text of a task's submission file."""
    if task.submission.format == "jsonl":
        return jsonl(task, labels, examples, found)
    writer = {
        "glue": glue, "superglue": superglue, "multirc": multirc, "record": record, "squad": squad, "conll": conll,
    }[task.submission.format]  # fmt: skip
    return writer(Scored(task, labels, examples, found))


def jsonl(task: Task, labels: Sequence[str], examples: Sequence[Example], found: Sequence[Prediction]) -> str:
    """A line per example: id, prediction, and probabilities where there are some."""
    return lines(describe(task, labels, *pair) for pair in zip(examples, found, strict=True))


def describe(task: Task, labels: Sequence[str], example: Example, found: Prediction) -> dict[str, Any]:
    """One prediction for a reader."""
    described: dict[str, Any] = {"id": example.id, "prediction": readable(task, labels, found.value)}
    if found.scores is not None:
        names = labels or [str(option) for option in range(len(found.scores))]
        described["probabilities"] = {n: round(float(p), 6) for n, p in zip(names, found.scores, strict=True)}
    return described


def readable(task: Task, labels: Sequence[str], value: Any) -> Any:
    """A predicted value with names instead of classes."""
    if task.head == "classification":
        return labels[value]
    if task.head == "multi_label":
        return [name for name, is_on in zip(labels, value, strict=True) if is_on]
    if task.head == "token":
        return [labels[tag] for tag in value]
    return value


def lines(rows: Any) -> str:
    """Lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def wanted_name(scored: Scored, value: Any) -> str:
    """What the benchmark wants to read for a predicted value."""
    name = str(readable(scored.task, scored.labels, value))
    return scored.task.submission.label_names.get(name, name)


def glue(scored: Scored) -> str:
    """Tab-separated index and prediction; STS-B's number is kept within 0 … 5."""
    rows = ["index\tprediction"]
    for number, value in enumerate(scored.values):
        text = f"{min(5.0, max(0.0, value)):.3f}" if scored.task.head == "regression" else wanted_name(scored, value)
        rows.append(f"{number}\t{text}")
    return "\n".join(rows) + "\n"


def index_of(text: str) -> int | str:
    """An `idx` as the benchmark writes it: a number."""
    return int(text) if text.isdigit() else text


def superglue(scored: Scored) -> str:
    """{"idx": …, "label": …} a line."""
    pairs = zip(scored.examples, scored.values, strict=True)
    is_choice = scored.task.head == "choice"
    return lines(
        {"idx": index_of(example.id), "label": value if is_choice else wanted_name(scored, value)}
        for example, value in pairs
    )


def multirc(scored: Scored) -> str:
    """A line per passage, with all its questions and answers."""
    passages: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for example, value in zip(scored.examples, scored.values, strict=True):
        passage, question = example.group.split("/")
        passages[passage][question].append({"idx": index_of(example.value), "label": int(value)})
    return lines(
        {
            "idx": index_of(passage),
            "passage": {"questions": [{"idx": index_of(q), "answers": answers} for q, answers in questions.items()]},
        }
        for passage, questions in passages.items()
    )


def record(scored: Scored) -> str:
    """{"idx": query, "label": entity} a line."""
    best = best_in_group(scored)
    return lines({"idx": index_of(group), "label": scored.examples[n].value} for group, n in best.items())


def squad(scored: Scored) -> str:
    """One object: question id -> answer."""
    pairs = zip(scored.examples, scored.values, strict=True)
    return json.dumps({example.id: value for example, value in pairs}, ensure_ascii=False, indent=1) + "\n"


def conll(scored: Scored) -> str:
    """Word and tag a line, a blank line after each sentence; a tab between them where a word holds a blank."""
    separator = "\t" if any(" " in word for example in scored.examples for word in example.texts) else " "
    sentences = []
    for example, tags in zip(scored.examples, scored.values, strict=True):
        named = zip(example.texts, tags, strict=True)
        sentences.append("".join(f"{word}{separator}{scored.labels[tag]}\n" for word, tag in named))
    return "\n".join(sentences)
