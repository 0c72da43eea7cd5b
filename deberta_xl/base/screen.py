"""The moving lines at the foot of a terminal, one for each piece of work that is going on; what is logged goes above.

A line is put together for the width there is: what must be known comes first and is never squeezed away, the rest is
left out piece by piece. Beside the work a thread of rich's draws, a few times a second.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from deberta_xl.base.durations import duration

REFRESHES_PER_SECOND = 4
GAP = "  "
FEWEST_CELLS = 16
"""What is shown of the first piece at least, where it is long."""
BAR_CELLS = range(10, 31)
KEPT = 64
"""Times that are remembered of the work so far."""


class Pace:
    """How fast work goes, from when its units were done since this start; what came before it does not count."""

    def __init__(self, done: float = 0):
        self.times = [(time.monotonic(), done)]
        self.last = self.times[0]
        self.num_calls, self.stride = 0, 1

    def reach(self, done: float) -> None:
        """So many units are done now."""
        self.last = (time.monotonic(), done)
        self.num_calls += 1
        if self.num_calls % self.stride == 0:
            self.times.append(self.last)
        if len(self.times) > KEPT:
            del self.times[1::2]
            self.stride *= 2

    def seconds_left(self, total: float) -> float | None:
        """How long the rest will take at the pace of the later half of the work; None before anything is done."""
        (first, (now, done)) = (self.times[0][1], self.last)
        if done <= first:
            return None
        start, reached = next((at, n) for at, n in reversed(self.times) if n <= (first + done) / 2 or n == first)
        per_unit = (now - start) / (done - reached)
        waited = min(time.monotonic() - now, per_unit)
        return max(0.0, (total - done) * per_unit - waited)

    def left(self, total: float) -> str:
        """The time left in words, empty as long as nobody knows it."""
        seconds = self.seconds_left(total)
        if seconds is None:
            return ""
        return f"{math.ceil(seconds)} s left" if seconds < 10 else f"{duration(seconds)} left"


class Line(Protocol):
    """What a piece of work shows of itself."""

    share: float
    """0 … 1."""

    def first(self) -> Sequence[str]:
        """What must be known, the most important first."""

    def further(self) -> Sequence[str]:
        """What is shown as far as there is room."""


def compose(line: Line, width: int, *, is_plain: bool = False) -> str:
    """One line of at most `width` cells; with a bar where there is room. `is_plain` keeps to ASCII."""
    pieces = [piece for piece in line.first() if piece]
    rest = cell_len(GAP.join(["", *pieces[1:]]))
    if width - rest >= FEWEST_CELLS:
        pieces[0] = end_of(pieces[0], width - rest, "..." if is_plain else "…")
    text = GAP.join(pieces)
    if cell_len(text) > width:
        return set_cell_size(text, width)
    for piece in line.further():
        if cell_len(text) + len(GAP) + cell_len(piece) <= width:
            pieces.append(piece)
            text = GAP.join(pieces)
    room = min(width - cell_len(text) - len(GAP), BAR_CELLS[-1])
    if room >= BAR_CELLS[0]:
        done, rest = "#." if is_plain else "━╌"
        filled = round(room * min(1.0, max(0.0, line.share)))
        pieces.insert(1, done * filled + rest * (room - filled))
    return GAP.join(pieces)


class SteadyConsole(Console):
    """A terminal whose cursor stays visible: a process that ends at once could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Called by rich, which would hide it."""
        return False


def end_of(text: str, width: int, mark: str) -> str:
    """As much of the end of a text as fits: of a path, its last parts."""
    if cell_len(text) <= width:
        return text
    while cell_len(mark + text) > width:
        text = text[1:]
    return mark + text


class Screen:
    """The lines of this process. Standard error is written through it meanwhile, so that nothing tears them."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.console: Console | None = None
        self.live: Live | None = None

    def is_there(self) -> bool:
        """Whether standard error is a terminal that can move its cursor."""
        return self.live is not None or Console(stderr=True).is_interactive

    def show(self, line: Line) -> None:
        """Add a line at the foot."""
        self.lines.append(line)
        if self.live is None:
            self.console = SteadyConsole(stderr=True)
            self.live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self.live.start()

    def hide(self, line: Line, *, is_kept: bool = False) -> None:
        """Take a line away; one that `is_kept` stays above as it is."""
        if line not in self.lines:
            return
        last = self.text_of(line) if is_kept else None
        self.lines.remove(line)
        if last is not None:
            self.console.print(Text(last), soft_wrap=True)
        if not self.lines:
            self.close()

    def render(self) -> Text:
        """All lines, for rich."""
        return Text("\n".join(map(self.text_of, list(self.lines))), no_wrap=True, overflow="crop")

    def text_of(self, line: Line) -> str:
        """A line for the terminal as wide as it is now; its last column stays free."""
        return compose(line, self.console.width - 1, is_plain=not self.console.encoding.lower().startswith("utf"))

    def close(self) -> None:
        """Leave the terminal clean; also before a process ends at once."""
        self.lines.clear()
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()


screen = Screen()
