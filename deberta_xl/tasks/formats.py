"""The benchmarks' own layouts, flattened to records with plain columns."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deberta_xl.tasks.records import Record, TaskDataError, parse_json, read_jsonl, read_records
from deberta_xl.tasks.text_files import lines_of, read_text

CAUSE_OR_EFFECT = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def label_first(path: Path) -> Iterator[Record]:
    """Lines `LABEL text`: columns label, text. TREC's coarse class is in `coarse`."""
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            label, _, text = line.partition(" ")
            yield Record(f"{path}:{number}", {"label": label, "coarse": label.partition(":")[0], "text": text.strip()})


def squad(path: Path) -> Iterator[Record]:
    """SQuAD's JSON, 1.1 or 2.0: columns id, context, question, answers (of text and start)."""
    for article in parse_json(read_text(path), str(path))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield Record(f"{path}, question {question['id']}", squad_fields(paragraph["context"], question))


def squad_fields(context: str, question: dict[str, Any]) -> dict[str, Any]:
    """One question's columns."""
    answers = question.get("answers")
    return {
        "id": str(question["id"]),
        "context": context,
        "question": question["question"],
        "answers": None if answers is None else [(answer["answer_start"], answer["text"]) for answer in answers],
        "is_impossible": question.get("is_impossible", False),
    }


def copa_xml(path: Path) -> Iterator[Record]:
    """COPA's first release: columns id, context, options, label."""
    try:
        items = ElementTree.fromstring(read_text(path)).findall("item")
    except ElementTree.ParseError as error:
        raise TaskDataError(f"{path} is not valid XML: {error}") from error
    for item in items:
        right = item.get("most-plausible-alternative")
        yield Record(
            f"{path}, item {item.get('id')}",
            {
                "id": item.get("id"),
                "context": f"{item.findtext('p')} {CAUSE_OR_EFFECT[item.get('asks-for', 'cause')]}",
                "options": [item.findtext("a1"), item.findtext("a2")],
                "label": None if right is None else int(right) - 1,
            },
        )


def copa(path: Path) -> Iterator[Record]:
    """SuperGLUE's COPA: columns id, context, options, label."""
    for place, row in read_records(path):
        need(row, place, "premise", "question", "choice1", "choice2")
        context = f"{row['premise']} {CAUSE_OR_EFFECT.get(row['question'], row['question'])}"
        fields = {"context": context, "options": [row["choice1"], row["choice2"]], "label": row.get("label")}
        yield Record(place, {"id": row.get("idx"), **fields})


def wic(path: Path) -> Iterator[Record]:
    """SuperGLUE's WiC: columns id, first (with the word in front), second, label."""
    for place, row in read_records(path):
        need(row, place, "word", "sentence1", "sentence2")
        first = f"{row['word']}: {row['sentence1']}"
        yield Record(
            place, {"id": row.get("idx"), "first": first, "second": row["sentence2"], "label": row.get("label")}
        )


def wsc(path: Path) -> Iterator[Record]:
    """SuperGLUE's WSC: columns id, first (the pronoun between asterisks), second (what it may mean), label."""
    for place, row in read_jsonl(path):
        need(row, place, "text", "target")
        words, target = row["text"].split(), row["target"]
        start = target["span2_index"]
        length = len(target["span2_text"].split())
        marked = [*words[:start], "*", *words[start : start + length], "*", *words[start + length :]]
        fields = {"first": " ".join(marked), "second": target["span1_text"], "label": row.get("label")}
        yield Record(place, {"id": row.get("idx"), **fields})


def multirc(path: Path) -> Iterator[Record]:
    """SuperGLUE's MultiRC, a record an answer: columns id, first (passage), second (question, answer), label, group."""
    for place, row in read_jsonl(path):
        need(row, place, "passage")
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                key = f"{row.get('idx')}/{question.get('idx')}"
                yield Record(
                    f"{place}, question {key}",
                    {
                        "id": f"{key}/{answer.get('idx')}",
                        "first": row["passage"]["text"],
                        "second": f"{question['question']} {answer['text']}",
                        "label": answer.get("label"),
                        "group": key,
                        "value": answer.get("idx"),
                    },
                )


def record(path: Path) -> Iterator[Record]:
    """SuperGLUE's ReCoRD, a record an entity: columns id, first (passage), second (query), label, group, value."""
    for place, row in read_jsonl(path):
        need(row, place, "passage", "qas")
        text = row["passage"]["text"]
        entities = dict.fromkeys(text[e["start"] : e["end"] + 1] for e in row["passage"]["entities"])
        for query in row["qas"]:
            answers = None if "answers" not in query else {answer["text"] for answer in query["answers"]}
            for number, entity in enumerate(entities):
                yield Record(
                    f"{place}, query {query['idx']}",
                    {
                        "id": f"{query['idx']}/{number}",
                        "first": text.replace("@highlight", "."),
                        "second": query["query"].replace("@placeholder", entity),
                        "label": None if answers is None else int(entity in answers),
                        "group": query["idx"],
                        "value": entity,
                        "answers": sorted(answers or ()),
                    },
                )


def race(path: Path) -> Iterator[Record]:
    """RACE's files of one article: columns id, context, question, options, label."""
    article = parse_json(read_text(path), str(path))
    need(article, str(path), "article", "questions", "options")
    letters = article.get("answers") or [None] * len(article["questions"])
    for number, (question, options, letter) in enumerate(
        zip(article["questions"], article["options"], letters, strict=True)
    ):
        fields = {"context": article["article"], "question": question, "options": options}
        label = None if letter is None else "ABCD".index(letter)
        name = f"{article.get('id', path.stem)}-{number}"
        yield Record(f"{path}, question {number}", {"id": name, **fields, "label": label})


def need(row: dict[str, Any], place: str, *names: str) -> None:
    """Refuse a row without these columns."""
    missing = [name for name in names if name not in row]
    if missing:
        raise TaskDataError(f"{place}: no column {', '.join(missing)}; there are: {', '.join(map(str, row))}")


FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "label_first": label_first,
    "squad": squad,
    "copa_xml": copa_xml,
    "copa": copa,
    "wic": wic,
    "wsc": wsc,
    "multirc": multirc,
    "record": record,
    "race": race,
}


def as_text(value: Any) -> str:
    """A value of a record as text: labels of all formats are compared as such."""
    if isinstance(value, bool):
        return str(value).lower()
    is_json = value is None or isinstance(value, (int, float, list, tuple, dict))
    return json.dumps(value, default=str) if is_json else str(value)
