"""What is a label, what stands for none, and which labels are one, written in two ways."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deberta_xl.base.errors import TaskDataError

MISSING_WORDS = ("nan", "null", "none", "na", "n/a", "#n/a", "<na>", "nil", "undefined", "?")
"""What programs write, in small letters, where a value is missing."""
WHOLE_NUMBER = re.compile(r"\+?(-?\d+)(?:\.0*)?")
"""1, 1.0 and +1 are one; 1.1 and 1.10, 7 and 007 may be two codes."""
TRUTHS = {"true": "1", "false": "0"}
SHOWN = 5


class Twins(NamedTuple):
    """Two labels that are one to a reader."""

    first: str
    second: str
    difference: str
    """In what they differ."""

    def __str__(self) -> str:
        show = ascii if self.difference in (UNICODE_FORM, INVISIBLE) else repr
        return f"{show(self.first)} and {show(self.second)} differ only in {self.difference}"


UNICODE_FORM, INVISIBLE = "their Unicode form", "blanks or characters that nobody sees"


def visible(text: str) -> str:
    """A text without characters that nobody sees (joiners, direction marks, byte-order marks, variation selectors)."""
    return "".join(c for c in text if not is_invisible(c))


def is_invisible(character: str) -> bool:
    """Whether a character has no look of its own; tags do: they make flags."""
    code = ord(character)
    is_selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    return is_selector or (unicodedata.category(character) in ("Cf", "Cc") and not 0xE0000 <= code <= 0xE007F)


def one_form(label: str) -> str:
    """A label in Unicode's compatible composed form."""
    return unicodedata.normalize("NFKC", label)


def in_plain_sight(label: str) -> str:
    """A label in one form, with single spaces and without what nobody sees."""
    return " ".join(visible(one_form(" ".join(label.split()))).split())


def folded(label: str) -> str:
    """What two ways of writing a label have in common: form, spaces, capitals, numbers, truth values."""
    text = in_plain_sight(label).casefold()
    text = TRUTHS.get(text, text)
    number = WHOLE_NUMBER.fullmatch(text)
    return number[1] if number else text


def difference(first: str, second: str) -> str:
    """In what two labels differ that are one when folded."""
    if one_form(first) == one_form(second):
        return UNICODE_FORM
    if in_plain_sight(first) == in_plain_sight(second):
        return INVISIBLE
    same = in_plain_sight(first).casefold() == in_plain_sight(second).casefold()
    return "capital letters" if same else "how a number or truth value is written"


def twins_of(labels: Sequence[str]) -> list[Twins]:
    """Pairs of labels that a reader takes for one, each label in one pair at most."""
    seen: dict[str, str] = {}
    found = []
    for label in labels:
        other = seen.setdefault(folded(label), label)
        if other != label:
            found.append(Twins(other, label, difference(other, label)))
    return found


def check_distinct(counts: Mapping[str, int], *, where: str) -> None:
    """Refuse labels, counted, of which one is written in two ways."""
    twins = twins_of(sorted(counts))
    if twins:
        first = twins[0]
        more = f" (and {len(twins) - 1} more such pairs)" if len(twins) > 1 else ""
        raise TaskDataError(
            f"{where}: the labels {first}{more}; they come {counts[first.first]:,} and {counts[first.second]:,} times, "
            "and would be two classes. Write them alike, map one to the other by label_names, or, where both are "
            "meant, list them in the task's labels"
        )


def check_no_missing_words(counts: Mapping[str, int], named: Sequence[str], *, where: str) -> None:
    """Refuse labels, counted, that look like missing values, unless the task's description names them."""
    found = [label for label in counts if folded(label) in MISSING_WORDS and label not in named]
    if found:
        listed = ", ".join(f"{label!r} ({counts[label]:,} times)" for label in found[:SHOWN])
        raise TaskDataError(
            f"{where}: the labels {listed} look like values that are missing. Where they are, list them in "
            "secret_labels or skipped_labels of the task's source; where they are a class, list all classes in labels"
        )


def is_missing(value: Any) -> bool:
    """Whether a value of a file is no label at all: null, not a number, or a text without anything to see."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, str) and not in_plain_sight(value))
