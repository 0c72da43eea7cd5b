"""Signs that long work gets on: given where it is done, heard by this process's heartbeat (run/heartbeat.py).

Like log records they go to whoever listens. Where nobody does, in a tool, they cost next to nothing.
"""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """What hears the signs of this process."""

    def moved(self) -> None:
        """A unit of work is done: a batch, a file, a piece of a large one."""

    def waits(self) -> None:
        """This process has done its part and waits for its peers."""


_listeners: list[Listener] = []


def listen(listener: Listener | None) -> None:
    """From now on `listener` hears the signs, in place of the one before; None: nobody."""
    _listeners[:] = [] if listener is None else [listener]


def is_heard() -> bool:
    """Whether this process is a rank of a run, which has a heartbeat."""
    return bool(_listeners)


def moved(_amount: int = 1, _note: str = "") -> None:
    """A unit of work is done. Called as often as it happens: it writes nothing, and waits for nothing."""
    for listener in _listeners:
        listener.moved()


def waits() -> None:
    """This process's part of something collective is done."""
    for listener in _listeners:
        listener.waits()
