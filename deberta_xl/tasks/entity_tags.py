"""Tags of words as entities, in whichever scheme a list of labels is written.

A tag says what its word is of an entity, and the entity's type: `B-PER`. Understood are, with the letter in front or
behind, capital or small, and any of the separators below:

IOB1, IOB2 (BIO)  B I          IOE1, IOE2  I E
IOBES (BIOES)     B I E S      BILOU       B I L U
BMES              B M E S      BMEWO       B M E W
IO                the type alone, beside a label for what is no entity

Entities are delimited as conlleval does, which reads tags that are not well formed, too: one begins at B and S, behind
E and S, and where the type changes or a word outside goes before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from deberta_xl.base.errors import TaskDataError
from deberta_xl.tasks.label_names import twins_of

OUTSIDE = ("O", "OTHER", "OUTSIDE", "OUT", "_")
"""What people call a word that is part of no entity, in capitals; the first that is there counts."""
ROLES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
"""Letter -> begin, inside, end or single, in conlleval's letters."""
ALPHABETS = {"BI": "IOB", "IE": "IOE", "BIES": "IOBES", "BILU": "BILOU", "BMES": "BMES", "BMEW": "BMEWO"}
LETTER = "[BIMELSUW]"
SEPARATOR = r"[-_:/.|‐‑–—－＿]"
IN_FRONT = re.compile(rf"(?P<role>{LETTER})(?:{SEPARATOR}(?P<type>.*))?", re.IGNORECASE | re.DOTALL)
BEHIND = re.compile(rf"(?:(?P<type>.*){SEPARATOR})?(?P<role>{LETTER})", re.IGNORECASE | re.DOTALL)
LONE_LETTER = re.compile(rf"(?:^|[\W_]){LETTER}(?:[\W_]|$)", re.IGNORECASE)
BRACKETS = re.compile(r"[()\[\]*]")
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
SHOWN = 5


class Part(NamedTuple):
    """What a word is of an entity."""

    role: str
    """B, I, E or S."""
    type: str
    """Type of the entity; empty where tags tell none."""


class TagScheme(NamedTuple):
    """How a task's labels tell entities."""

    name: str
    """For the report: the scheme and how its tags look."""
    parts: Mapping[str, Part | None]
    """Label -> part; None for words outside."""

    def entities(self, tags: Sequence[str]) -> set[tuple[str, int, int]]:
        """Type, first and behind-last word of the entities that a sentence's tags delimit."""
        found, start = set(), 0
        before: Part | None = None
        for number, part in enumerate([*(self.parts[tag] for tag in tags), None]):
            begins = part is not None and begins_entity(before, part)
            if before is not None and (part is None or begins):
                found.add((before.type, start, number))
            start = number if begins else start
            before = part
        return found


def begins_entity(before: Part | None, part: Part) -> bool:
    """Whether an entity begins at a word, by the word before."""
    return before is None or part.role in "BS" or before.role in "ES" or part.type != before.type


def outside_of(labels: Sequence[str]) -> str | None:
    """The label of words outside entities, None where there is none."""
    return next((label for name in OUTSIDE for label in labels if label.upper() == name), None)


def scheme_of(labels: Sequence[str]) -> TagScheme:
    """The scheme in which labels are written. Raises TaskDataError, with what is allowed, when it is none of them."""
    outside = outside_of(labels)
    tags = [label for label in labels if label != outside]
    for form, look in ((IN_FRONT, "{}-TYPE"), (BEHIND, "TYPE-{}")):
        matches = [form.fullmatch(tag) for tag in tags]
        if not tags or not all(matches):
            continue
        letters = {match["role"].upper() for match in matches}
        name = next((name for alphabet, name in ALPHABETS.items() if letters <= set(alphabet)), None)
        if name is None or (form is IN_FRONT and not letters & set("BI") and all(map(BEHIND.fullmatch, tags))):
            continue
        looks = ", ".join(look.format(letter) for letter in sorted(letters))
        parts = {tag: Part(ROLES[m["role"].upper()], m["type"] or "") for tag, m in zip(tags, matches, strict=True)}
        if twins := twins_of(sorted({part.type for part in parts.values()})):
            refuse(tags, f"the types {twins[0]}")
        return TagScheme(f"{name} ({looks})", {**parts, **({} if outside is None else {outside: None})})
    refuse_unclear(tags, outside)
    return TagScheme("IO (the type alone)", {**{tag: Part("I", tag) for tag in tags}, outside: None})


def refuse_unclear(tags: Sequence[str], outside: str | None) -> None:
    """Refuse labels that are no bare types, either."""
    reason = None
    if numbers := [tag for tag in tags if NUMBER.fullmatch(tag)]:
        reason = f"{shown(numbers)} are numbers: give their names by label_names"
    elif outside is None:
        reason = f"none of them is for words outside entities ({', '.join(OUTSIDE)})"
    elif brackets := [tag for tag in tags if BRACKETS.search(tag)]:
        reason = f"{shown(brackets)} have brackets"
    elif lone := [tag for tag in tags if LONE_LETTER.search(tag)]:
        others = [tag for tag in tags if tag not in lone]
        beside = f", {shown(others)} have none" if others else " in no known scheme"
        reason = f"{shown(lone)} have letters for a place in an entity{beside}"
    elif are_joined(tags):
        reason = f"{shown(tags)} begin with letters for a place in an entity, but nothing separates them"
    if reason:
        refuse(tags, reason)


def refuse(tags: Sequence[str], reason: str) -> NoReturn:
    """Say what is wrong with labels, and what is understood."""
    raise TaskDataError(
        f"span_f1 cannot tell which words are an entity by the labels {shown(tags)}: {reason}. Understood are "
        "B- and I- (IOB), I- and E- (IOE), B- I- E- S- (IOBES), B- I- L- U- (BILOU), B- M- E- S-, B- M- E- W-, each in "
        "front of a type or behind it, and types alone beside O; rewrite the tags, map them by label_names, or measure "
        'metrics = ["accuracy"]'
    )


def are_joined(tags: Sequence[str]) -> bool:
    """Whether tags look like BPER, IPER: every ending comes with several letters."""
    letters: dict[str, set[str]] = {}
    for tag in tags:
        letters.setdefault(tag[1:], set()).add(tag[:1].upper())
    found = set().union(*letters.values())
    is_alphabet = any(found <= set(alphabet) for alphabet in ALPHABETS)
    return bool(letters) and is_alphabet and "" not in letters and all(len(of) > 1 for of in letters.values())


def shown(tags: Sequence[str]) -> str:
    """Some labels for a message."""
    more = f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else ""
    return ", ".join(map(repr, tags[:SHOWN])) + more
