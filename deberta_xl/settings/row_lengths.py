"""Rows that grow longer within a run: which steps have rows of which length.

A step has equally many tokens throughout: where a row of `model.sequence_length` would stand there are several shorter
ones, in the global batch as in each micro-batch. So batch sizes, the number of micro-batches, and places in the data
that are counted in rows of `model.sequence_length` are the same at every length.
"""

from __future__ import annotations

from typing import NamedTuple

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import divisors

SHORTEST = 8
"""Tokens of a row."""
FORM = "LENGTH:SHARE, several with commas between them, for example 512:0.8,2048:0.15"


class Stretch(NamedTuple):
    """Steps one after the other whose rows are equally long."""

    length: int
    """Tokens of a row, [CLS] and [SEP] included."""
    first_step: int
    """Counted from 1."""
    last_step: int
    """Before `first_step` where the share is less than a step."""
    pieces: int
    """Rows in the place of one of `model.sequence_length`."""


def read_shares(text: str | None) -> list[tuple[int, float]]:
    """Length and share of the steps, in turn, of `512:0.8,2048:0.15`. Raises ConfigError."""
    shares = []
    for entry in text.split(",") if text is not None else ():
        length, _, share = entry.partition(":")
        try:
            shares.append((int(length), float(share)))
        except ValueError:
            raise ConfigError(f"lengths={text!r} is not {FORM}") from None
    lengths = [length for length, _ in shares]
    if lengths != sorted(set(lengths)) or min(lengths, default=SHORTEST) < SHORTEST:
        raise ConfigError(f"lengths={text!r}: rows become longer from one length to the next; the least is {SHORTEST}")
    total = sum(share for _, share in shares)
    if any(not share > 0 for _, share in shares) or not total < 1:
        raise ConfigError(
            f"lengths={text!r}: the shares of the steps, {total:g} in all, must each be above 0 and together below 1: "
            "the other steps have rows of model.sequence_length"
        )
    return shares


def check_lengths(text: str | None, longest: int, slices: int) -> None:
    """Refuse lengths that are not below `longest`, do not divide it, or do not divide into `slices`, the ranks of
    sequence parallelism. Raises ConfigError."""
    possible = [n for n in divisors(longest) if SHORTEST <= n < longest and n % slices == 0]
    for length, _ in read_shares(text):
        if length not in possible:
            over_ranks = f" over parallel.tensor_parallel_size={slices} ranks" if slices > 1 else ""
            raise ConfigError(
                f"train.lengths={text}: rows of {length} tokens do not go before those of model.sequence_length="
                f"{longest}: a step could not have equally many tokens{over_ranks}; possible: "
                f"{', '.join(map(str, possible)) or 'none, so leave train.lengths out'}"
            )


def stretches(text: str | None, longest: int, steps: int) -> list[Stretch]:
    """A run of so many steps; the last stretch has rows of the `longest`."""
    found, last_step, done = [], 0, 0.0
    for length, share in [*read_shares(text), (longest, 1.0)]:
        first_step, done = last_step + 1, min(1.0, done + share)
        last_step = round(done * steps)
        found.append(Stretch(length, first_step, last_step, longest // length))
    return found
