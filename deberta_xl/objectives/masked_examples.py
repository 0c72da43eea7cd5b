"""Example predictions in their sentence: masked places of the first held-out rows, and what was guessed there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from deberta_xl.objectives.rows import MaskedRows
from deberta_xl.run.figure_text import literal, plain

EXAMPLES = 24
AROUND = 12
"""Tokens shown on either side of a masked place."""
PADDING = 0
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class MaskedPlace(NamedTuple):
    """A place that is to be predicted."""

    before: list[int]
    """Token ids in front of it."""
    label: int
    behind: list[int]
    """Token ids that follow, without padding."""


class MaskedExamples:
    """Keeps the first masked places of the batches that pass through it."""

    def __init__(self) -> None:
        self.places: list[MaskedPlace] = []

    def watch(self, batches: Iterable[MaskedRows]) -> Iterator[MaskedRows]:
        """The same batches."""
        for batch in batches:
            if len(self.places) < EXAMPLES:
                self.places += itertools.islice(places_of(batch), EXAMPLES - len(self.places))
            yield batch

    def table(self, guess_L: Tensor, piece_of: Callable[[int], str]) -> str:
        """The places with the best guesses for them, as a Markdown table. `guess_L` begins with theirs."""
        rows = [
            f"| {sentence(place, piece_of)} | {literal(piece_of(place.label))} | {literal(piece_of(guess))} | "
            f"{'yes' if place.label == guess else ''} |"
            for place, guess in zip(self.places, guess_L[: len(self.places)].tolist(), strict=True)
        ]
        return "\n".join(["| text | masked word | best guess | right |", "|---|---|---|---|", *rows])


def places_of(batch: MaskedRows) -> Iterator[MaskedPlace]:
    """The labelled places of a batch on the host, in the order of its labels."""
    positions_BM = batch.labelled.position_BM
    slots = batch.labelled.slot_L.tolist()
    for slot, label in zip(slots, batch.labelled.label_L.tolist(), strict=True):
        row = batch.input_ids_BS[slot // positions_BM.shape[1]].tolist()
        place = int(positions_BM.view(-1)[slot])
        behind = [token for token in row[place + 1 : place + 1 + AROUND] if token != PADDING]
        yield MaskedPlace(row[max(0, place - AROUND) : place], label, behind)


def sentence(place: MaskedPlace, piece_of: Callable[[int], str]) -> str:
    """The text around a place, which is in bold, as Markdown."""
    before, behind = (text_of([piece_of(token) for token in ids]) for ids in (place.before, place.behind))
    blank = " " if piece_of(place.label).startswith("▁") else ""
    return f"{plain(before)}{blank}<strong>{plain('[MASK]')}</strong>{plain(behind)}"


def text_of(pieces: Iterable[str]) -> str:
    """Pieces as a text; bytes become the characters they stand for."""
    text = re.sub(
        rf"(?:{BYTE.pattern})+",
        lambda found: bytes(int(byte, 16) for byte in BYTE.findall(found[0])).decode("utf-8", "replace"),
        "".join(pieces),
    )
    return text.replace("▁", " ")
