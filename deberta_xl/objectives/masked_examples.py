"""Example predictions in their sentence: places of the first held-out rows, and what was guessed there."""

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
    """Keeps the first places of the batches that pass through it."""

    what = "masked word"
    stride = 1
    """Of so many places one is kept."""

    def __init__(self) -> None:
        self.places: list[MaskedPlace] = []
        self.num_seen = 0

    def watch(self, batches: Iterable[MaskedRows]) -> Iterator[MaskedRows]:
        """The same batches."""
        for batch in batches:
            if len(self.places) < EXAMPLES:
                new = itertools.islice(self.places_of(batch), -self.num_seen % self.stride, None, self.stride)
                self.places += itertools.islice(new, EXAMPLES - len(self.places))
                self.num_seen += batch.labelled.num_labels
            yield batch

    def places_of(self, batch: MaskedRows) -> Iterator[MaskedPlace]:
        """All that is predicted in a batch, in the order of its labels."""
        return places_of(batch)

    def table(self, guess_L: Tensor, piece_of: Callable[[int], str]) -> str:
        """The places with the best guesses for them, as a Markdown table. `guess_L` has those of all that was seen."""
        guesses = guess_L[:: self.stride][: len(self.places)].tolist()
        rows = [
            f"| {sentence(place, piece_of)} | {literal(piece_of(place.label))} | {literal(piece_of(guess))} | "
            f"{'yes' if place.label == guess else ''} |"
            for place, guess in zip(self.places, guesses, strict=True)
        ]
        return "\n".join([f"| text | {self.what} | best guess | right |", "|---|---|---|---|", *rows])


class NextExamples(MaskedExamples):
    """Places whose next token is predicted: shown is what comes before it, itself the last of what is read."""

    what = "next piece"
    stride = 29

    def places_of(self, batch: MaskedRows) -> Iterator[MaskedPlace]:
        """What is read up to each label, and the label."""
        return (
            place._replace(before=[*place.before, own][-AROUND:], behind=[])
            for place, own in zip(places_of(batch), own_tokens(batch), strict=True)
        )


def own_tokens(batch: MaskedRows) -> list[int]:
    """The token at each labelled position."""
    labelled = batch.labelled.without_padding()
    return batch.input_ids_BS.gather(1, labelled.position_BM).view(-1)[labelled.slot_L].tolist()


def places_of(batch: MaskedRows) -> Iterator[MaskedPlace]:
    """The labelled places of a batch on the host, in the order of its labels."""
    labelled = batch.labelled.without_padding()
    positions_BM = labelled.position_BM
    for slot, label in zip(labelled.slot_L.tolist(), labelled.label_L.tolist(), strict=True):
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
