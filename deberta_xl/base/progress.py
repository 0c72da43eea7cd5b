"""Progress of long work: a line that moves on a terminal, a line now and then in a log file, nothing for short work.

Whoever works says how much is done, on every rank; rank 0 shows it, and each rank's heartbeat hears it (signs.py).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from deberta_xl.base import signs
from deberta_xl.base.log import current_rank, logger
from deberta_xl.base.screen import Pace, screen

SHOWN_AFTER_SECONDS = 1.0
"""Work that is done sooner shows nothing on a terminal."""
LINE_SECONDS = 10.0
"""Work that is done sooner writes nothing into a log."""
LONGEST_PAUSE_SECONDS = 600.0
"""Lines come further and further apart: the next one when the work has gone on for a fifth longer, or after this."""

Item = TypeVar("Item")


class Work:
    """A piece of work as it is shown."""

    def __init__(self, description: str, total: float, unit: str):
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note, self.pace = 0, "", Pace()

    @property
    def share(self) -> float:
        """How much of it is done, 0 … 1; 0 where nobody knows (a pipe)."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def left(self) -> str:
        """The time left, as far as it is known."""
        return self.pace.left(self.total) if self.total else ""

    def count(self) -> str:
        """`120/1,000 batches`; nothing for work that is not tracked in anything people know."""
        if not self.unit:
            return ""
        return f"{self.done:,}/{self.total:,} {self.unit}" if self.total else f"{self.done:,} {self.unit}"

    def first(self) -> Sequence[str]:
        """What must be known."""
        return f"{self.description} {self.share:.0%}" if self.total else self.description, self.left()

    def further(self) -> Sequence[str]:
        """What is shown as far as there is room."""
        return [piece for piece in (self.count(), self.note) if piece]


@contextlib.contextmanager
def progress(description: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show progress on standard error. Yields `advance(amount, note)`; `note` is shown beside the share of `total`.

    With a `unit` in the plural ("batches") the numbers are shown, too.
    """
    work = Work(description, total, unit)
    show = Silent() if current_rank() else OnTerminal(work) if screen.is_there() else InLog(work)

    def advance(amount: int = 1, note: str = "") -> None:
        work.done += amount
        work.note = note
        work.pace.reach(work.done)
        show.move()
        signs.moved()

    try:
        yield advance
    finally:
        show.end()


def tracked(items: Iterable[Item], description: str, total: int, unit: str) -> Iterator[Item]:
    """The items, each of them tracked when the next is asked for."""
    with progress(description, total, unit) as advance:
        for item in items:
            yield item
            advance()


class Silent:
    """Nothing: another rank shows it."""

    def move(self) -> None:
        """Something was done."""

    def end(self) -> None:
        """The work is over."""


class OnTerminal(Silent):
    """A line of the screen."""

    def __init__(self, work: Work):
        self.work, self.due = work, time.monotonic() + SHOWN_AFTER_SECONDS

    def move(self) -> None:
        """Come up when the work has taken a while."""
        if time.monotonic() >= self.due:
            self.due = float("inf")
            screen.show(self.work)

    def end(self) -> None:
        """Go away."""
        screen.hide(self.work)


class InLog(Silent):
    """A line now and then."""

    def __init__(self, work: Work):
        self.work, self.begin = work, time.monotonic()
        self.due = self.begin + LINE_SECONDS

    def move(self) -> None:
        """Write when it is time."""
        work, now = self.work, time.monotonic()
        if now < self.due:
            return
        gone = now - self.begin
        longer = min(gone / 5, LONGEST_PAUSE_SECONDS) if gone > LINE_SECONDS * 5 else 0.0
        self.due = now + max(LINE_SECONDS, longer)
        left = work.left() if gone > SHOWN_AFTER_SECONDS else ""
        note = ", ".join(piece for piece in (work.count(), left) if piece)
        share = f"{work.share:.0%}" if work.total else ""
        text = " ".join(piece for piece in (f"{work.description}:", share, note, work.note) if piece)
        if signs.is_heard():
            logger.info("%s", text)  # in a run: dated, and in its log file
        else:
            sys.stderr.write(text + "\n")
