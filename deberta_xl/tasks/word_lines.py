"""Files of a word a line, with its tag in another column, and a blank line between sentences: CoNLL's, and its kin.

A file has one separator (tabs, spaces, or, where there is neither, other blanks, commas or semicolons) and as many
columns in every line. The first one is the word and the last one the tag, unless the task's source names columns:

    header = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]
    first = "form"
    label = "upos"

Lines that begin a document (-DOCSTART-), and CoNLL-U's comments (#) before a sentence, are passed over.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deberta_xl.base.errors import TaskDataError
from deberta_xl.tasks.entity_tags import outside_of
from deberta_xl.tasks.records import Record
from deberta_xl.tasks.task import Source
from deberta_xl.tasks.text_files import lines_of

DOCUMENT = "-DOCSTART-"
COMMENT = re.compile(r"#(?: |\s*\S+\s*=)")
ASSIGNMENT = re.compile(r"#\s*\S+\s+= ")
INDEX = re.compile(r"\d+(?:[-.]\d+)?")
RANGE = re.compile(r"\d+[-.]\d+")
"""CoNLL-U's numbers of words that stand for several, or for none in the text: other lines have the words."""
TAG = re.compile(r"[BIMELSUW][-_:/.|].+|.+[-_:/.|][BIMELSUW]", re.IGNORECASE)
COLUMN_NAMES = ("tag", "tags", "label", "labels", "ner", "ner_tag", "ner_tags")
INVISIBLE_ENDS = "\ufeff\u200b"
"""What files put together may have at the beginning of a line."""


class Line(NamedTuple):
    """A line of a file."""

    number: int
    text: str


class Row(NamedTuple):
    """A line, split."""

    number: int
    fields: list[str]


Sentence = list[Line]


def split_csv(text: str, separator: str) -> list[str]:
    """Fields, some of them in quotes."""
    return next(csv.reader([text], delimiter=separator), [])


SEPARATORS: dict[str, tuple[re.Pattern[str], Callable[[str], list[str]]]] = {
    "tabs": (
        re.compile(r"[^ \t][^\t]*\t"),
        lambda text: [field.strip(" ") for field in text.rstrip("\t ").split("\t")],
    ),
    "tabs and spaces": (re.compile(r"[ \t]"), lambda text: re.findall(r"[^ \t]+", text)),
    "blanks": (re.compile(r"\s"), lambda text: text.split()),
    "commas": (re.compile(","), lambda text: split_csv(text, ",")),
    "semicolons": (re.compile(";"), lambda text: split_csv(text, ";")),
}
"""Name -> what a line has that uses it, and how it splits a line; the first that every line has counts."""


def read_words(path: Path, source: Source) -> Iterator[Record]:
    """A record a sentence, with the columns that the source calls `first` (words) and `label` (tags).

    Words alone have the tags None. Raises TaskDataError naming file and line.
    """
    sentences = list(sentences_of(lines_of(path)))
    rows = split_sentences(sentences, path)
    word, tag = columns_of(source, path, rows)
    names = source.first or "words", source.label or "tags"
    for row in (row for of_sentence in rows for row in of_sentence):
        if not row.fields[word] or (tag is not None and not row.fields[tag]):
            raise TaskDataError(f"{path}:{row.number}: a word and its tag are expected, not {row.fields}")
    for of_sentence in rows:
        kept = [row.fields for row in of_sentence if word == 0 or not RANGE.fullmatch(row.fields[0])]
        columns = [f[word] for f in kept], None if tag is None else [f[tag] for f in kept]
        if kept:
            yield Record(f"{path}:{of_sentence[0].number}", dict(zip(names, columns, strict=True)))


def sentences_of(lines: Sequence[str]) -> Iterator[Sentence]:
    """The lines of each sentence, without comments."""
    sentence: Sentence = []
    for number, raw in enumerate([*lines, ""], 1):
        text = raw.rstrip("\r").lstrip(INVISIBLE_ENDS)
        if text.strip() and not text.startswith(DOCUMENT):
            sentence.append(Line(number, text))
        elif sentence:
            yield sentence
            sentence = []


def split_sentences(sentences: Sequence[Sentence], path: Path) -> list[list[Row]]:
    """The fields of each line of each sentence, without the comments before it.

    Raises TaskDataError for a line with more or fewer columns than most.
    """
    split = separator_of([line.text for sentence in sentences for line in sentence])
    rows = [[Row(line.number, split(line.text)) for line in sentence] for sentence in sentences]
    widths = Counter(len(row.fields) for of_sentence in rows for row in of_sentence)
    width = max(widths, key=widths.__getitem__, default=0)
    tags = {r.fields[-1] for rs in rows for r in rs if len(r.fields) == width and not r.fields[0].startswith("#")}
    found = []
    for sentence, of_sentence in zip(sentences, rows, strict=True):
        skipped = 0
        while skipped < len(sentence) and is_comment(sentence[skipped].text, of_sentence[skipped], width, tags):
            skipped += 1
        found.append(of_sentence[skipped:])
        for line, row in zip(sentence[skipped:], found[-1], strict=True):
            if len(row.fields) != width:
                raise TaskDataError(
                    f"{path}:{line.number}: {len(row.fields)} columns, where most lines have {width}: {line.text!r}; "
                    "words hold no separator (in files without tabs, no blank), and every word has its tag"
                )
    return [of_sentence for of_sentence in found if of_sentence]


def is_comment(text: str, row: Row, width: int, tags: Collection[str]) -> bool:
    """Whether a line before a sentence says something of it; `# NN` may as well be a word with its tag."""
    if not text.startswith("#"):
        return False
    tag = row.fields[-1]
    is_tag = tag in tags or bool(TAG.fullmatch(tag)) or outside_of([tag]) is not None
    is_word = len(row.fields) == width and (width == 1 or is_tag)
    return not is_word or bool(ASSIGNMENT.match(text))


def separator_of(lines: Sequence[str]) -> Callable[[str], list[str]]:
    """How lines are split: by the first separator that every line has, or most have; words alone have none."""
    data = [line for line in lines if not COMMENT.match(line)] or lines
    for enough in (1.0, 0.5):
        for uses, split in SEPARATORS.values():
            if data and sum(bool(uses.search(line)) for line in data) >= max(1, enough * len(data)):
                return split
    return lambda text: [text]


def columns_of(source: Source, path: Path, rows: Sequence[Sequence[Row]]) -> tuple[int, int | None]:
    """Numbers of the columns of word and tag; None where there are words alone."""
    width = len(rows[0][0].fields) if rows else 1
    if source.header is None:
        if source.first not in (None, "words") or source.label not in (None, "tags"):
            raise TaskDataError(f"{path}: first and label name columns: name all {width} of them in header")
        check_columns(width, path, rows)
        return 0, width - 1 if width > 1 else None
    if width != len(source.header):
        raise TaskDataError(f"{path}: {width} columns, but header names {len(source.header)}: {source.header}")
    word, tag = source.first or "words", source.label or "tags"
    for key, name in (("first", word), ("label", tag)):
        if name not in source.header:
            raise TaskDataError(f"{path}: {key}={name!r} is none of the columns in header: {source.header}")
    return source.header.index(word), source.header.index(tag)


def check_columns(width: int, path: Path, rows: Sequence[Sequence[Row]]) -> None:
    """Refuse a file whose first column counts the words, or whose tags are in another column than the last.

    Raises TaskDataError with what to write.
    """
    if width == 1:
        return
    columns = [{row.fields[n] for of_sentence in rows for row in of_sentence} for n in range(width)]
    others = [n + 1 for n, values in enumerate(columns[:-1]) if are_tags(values)]
    reason = None
    if rows and rows[0][0].fields[-1].casefold() in COLUMN_NAMES:
        reason = f"the first line, {rows[0][0].fields}, names them: delete it"
    elif all(INDEX.fullmatch(value) for value in columns[0]):
        reason = "the first one counts the words"
    elif others and not are_tags(columns[-1]) and columns[-1] != {"O"}:
        reason = f"entity tags are in column {others[0]}, not in the last one"
    if reason:
        names = [f"column{n + 1}" for n in range(width)]
        raise TaskDataError(
            f"{path}: {width} columns, and {reason}. A task of your own says which one is the word and which one the "
            f'tag: format = "conll", header = {names}, first = "column2", label = "column{width}", for example'
        )


def are_tags(values: Collection[str]) -> bool:
    """Whether a column holds entity tags with their letters, B-PER, and O."""
    tags = [value for value in values if not outside_of([value])]
    return bool(tags) and all(TAG.fullmatch(tag) for tag in tags)
