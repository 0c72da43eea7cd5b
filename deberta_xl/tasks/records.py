"""Files of tasks as records: dictionaries, each with its place for messages. Nothing here knows what a task is.

Understood are .jsonl and .json (an object a line, a list, an object whose `data` is one, or objects over several lines,
under either ending), .tsv (as GLUE writes it: no quoting), .csv,
.parquet, and a folder that Hugging Face's `datasets` has saved, when that library is present.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from json.decoder import WHITESPACE
from pathlib import Path
from typing import Any, NamedTuple

from deberta_xl.base.errors import TaskDataError
from deberta_xl.base.log import rank_zero
from deberta_xl.tasks.text_files import open_text

csv.field_size_limit(2**27)


class Record(NamedTuple):
    """One row of a file."""

    place: str
    """File and line (or number), for messages."""
    fields: dict[str, Any]


def read_records(path: Path, columns: Sequence[str] | None = None, *, skips_broken: bool = False) -> Iterator[Record]:
    """The rows of a file by its suffix; `columns` names those of a .tsv or .csv without header.

    A row of a table with another number of columns is left out and counted where `skips_broken`. Raises TaskDataError
    naming file and line.
    """
    readers = {
        ".jsonl": read_jsonl, ".json": read_jsonl, ".tsv": read_table, ".csv": read_table, ".txt": read_table,
        ".parquet": read_parquet,
    }  # fmt: skip
    reader = read_datasets_folder if path.is_dir() else readers.get(path.suffix)
    if reader is None:
        known = ", ".join(readers)
        raise TaskDataError(f"{path}: files of this kind cannot be read; known: {known}, and folders of `datasets`")
    yield from reader(path, columns, skips_broken) if reader is read_table else reader(path)


def read_jsonl(path: Path) -> Iterator[Record]:
    """An object per line, empty lines passed over; where the first line is none, what else JSON has for rows."""
    with open_text(path) as file:
        first, number = "", 0
        while not first.strip() and (line := file.readline()):
            first, number = line, number + 1
        if not is_object(first):
            yield from read_spread(first + file.read(), number, path)
            return
        for line_number, line in enumerate(itertools.chain([first], file), number):
            if line.strip():
                place = f"{path}:{line_number}"
                yield Record(place, as_object(parse_json(line, place), place))


def is_object(line: str) -> bool:
    """Whether a line is a JSON object by itself, and not one that holds all rows."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and not isinstance(value.get("data"), list)


def read_spread(text: str, first_line: int, path: Path) -> Iterator[Record]:
    """The objects of a list, of the list `data` of one object, or that follow each other over several lines."""
    values, decoder, place = [], json.JSONDecoder(), WHITESPACE.match(text, 0).end()
    line = first_line + text.count("\n", 0, place)
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TaskDataError(f"{path}:{line}: not valid JSON: {getattr(error, 'msg', error)}") from error
        values.append((f"{path}:{line}", value))
        end = WHITESPACE.match(text, end).end()
        line, place = line + text.count("\n", place, end), end
    if len(values) == 1:
        rows = values[0][1].get("data") if isinstance(values[0][1], dict) else values[0][1]
        if isinstance(rows, list):
            values = [(f"{path}, record {number}", row) for number, row in enumerate(rows)]
    for where, value in values:
        yield Record(where, as_object(value, where))


def parse_json(text: str, place: str) -> Any:
    """One JSON value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskDataError(f"{place}: not valid JSON: {error.msg}") from error


def as_object(value: Any, place: str) -> dict[str, Any]:
    """`value`, which must be an object."""
    if not isinstance(value, dict):
        raise TaskDataError(f"{place}: a JSON object is expected, with a key for each column")
    return value


def read_table(path: Path, columns: Sequence[str] | None, skips_broken: bool) -> Iterator[Record]:
    """Rows of a table, with the names of its first line or those given.

    Tabs separate unquoted fields in .tsv and .txt; .csv has commas and quotes.
    """
    is_csv = path.suffix == ".csv"
    dialect = {"delimiter": ",", "strict": True} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    broken = []
    with open_text(path, newline="") as file:
        rows = csv.reader(file, **dialect)
        names = list(columns) if columns else next(rows, [])
        if twice := [name for number, name in enumerate(names) if name and name in names[:number]]:
            raise TaskDataError(f"{path}: several columns are called {twice[0]!r}; name all columns differently")
        for row in filter(None, whole_rows(rows, path)):
            place = f"{path}:{rows.line_num}"
            if len(row) == len(names):
                yield Record(place, dict(zip(names, row, strict=True)))
            elif skips_broken:
                broken.append(place)
            else:
                raise TaskDataError(f"{place}: {len(row)} columns, expected {len(names)}: {', '.join(names)}")
    if broken:
        text = "%d rows were left out: they have not %d columns; the first is %s"
        rank_zero(text, len(broken), len(names), broken[0], level=logging.WARNING)


def whole_rows(rows: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    """The rows. Raises TaskDataError for quotes that do not close."""
    try:
        yield from rows
    except csv.Error as error:
        raise TaskDataError(f"{path}: not a table with commas and quotes: {error}") from error


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows of a Parquet file."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskDataError(f"{path} is not a Parquet file, or is damaged: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield Record(f"{path}, row {number}", row)


def read_datasets_folder(path: Path) -> Iterator[Record]:
    """Rows of what `datasets.Dataset.save_to_disk` wrote: names for class numbers, None for secret ones."""
    try:
        import datasets
        import pyarrow
    except ImportError:
        raise TaskDataError(
            f"{path} is a folder: to read what Hugging Face's `datasets` saved, `pip install datasets` first, or give "
            "the task's files"
        ) from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise TaskDataError(f"{path} is not a folder that `Dataset.save_to_disk` wrote: {error}") from error
    if not isinstance(dataset, datasets.Dataset):
        raise TaskDataError(f"{path} holds several splits: {', '.join(dataset)}; each is a folder in it, name those")
    kinds = {name: getattr(kind, "feature", kind) for name, kind in dataset.features.items()}
    names = {name: kind.names for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(dataset):
        named = {name: class_names(row[name], names[name]) for name in names}
        yield Record(f"{path}, row {number}", {**row, **named})


def class_names(value: int | list[int] | None, names: Sequence[str]) -> str | list[str | None] | None:
    """Names of class numbers; None for one that is none, by which benchmarks keep a label secret."""
    if isinstance(value, list):
        return [class_names(each, names) for each in value]
    return names[value] if value is not None and 0 <= value < len(names) else None
