"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

#: Seconds between two lines where there is no terminal.
LINE_SECONDS = 10.0


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show progress on standard error. Yields `advance(amount, note)`; `note` is shown beside the share of `total`."""
    console = Console(stderr=True)
    with bar(description, total, console) if console.is_terminal else lines(description, total) as advance:
        yield advance


@contextlib.contextmanager
def bar(description: str, total: int, console: Console) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as shown:
        task = shown.add_task(description, total=total, note="")
        yield lambda amount, note="": shown.update(task, advance=amount, note=note)


@contextlib.contextmanager
def lines(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A line every LINE_SECONDS."""
    done, last = 0, time.monotonic()

    def advance(amount: int, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            sys.stderr.write(f"{description}: {done / max(total, 1):.0%} {note}".rstrip() + "\n")

    yield advance
