"""Ctrl-C and its kin in tools: the work ends within seconds, and what is left is told in a true sentence.

Python runs no signal handler while foreign code runs (a model's forward, a rank that waits for its peers), so a thread
ends the process when the work has not done so by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from deberta_xl.base.output_file import is_stream

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the request to end, the terminal that is closed."""
PATIENCE_SECONDS = 2.0
"""Time for cleaning up after a signal."""

_held: list[int] | None = None
"""Where `held_back` notes the signals that come meanwhile."""


class Interrupted(KeyboardInterrupt):
    """A signal of ENDING has come."""

    def __init__(self, number: int, text: str | None = None):
        super().__init__(text or "interrupted")
        self.number = number
        self.text = text
        """What is left, from who knows it."""

    @property
    def status(self) -> int:
        """The exit status that shells give for such an end."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible(insist: Callable[[int], None] | None) -> Iterator[None]:
    """Raise Interrupted at the first signal of ENDING, and pass over later ones.

    `insist(number)` is called in a thread when the context has not been left PATIENCE_SECONDS after the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    received: list[int] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            if _held is None:
                raise Interrupted(number)
            _held.append(number)

    before = {number: signal.signal(number, receive) for number in numbers}
    with contextlib.ExitStack() as stack:
        if insist is not None:
            stack.enter_context(watched(numbers, insist))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: a library's, not Python's


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Raise Interrupted after this context, not in it; processes that are started in it never see signals of ENDING.

    The mask alone, which they inherit, holds nothing back: another thread may receive the signal for this one.
    """
    global _held
    came: list[int] = []
    _held, before = came, signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _held = None
    if came:
        raise Interrupted(came[0])


@contextlib.contextmanager
def watched(numbers: Iterable[int], insist: Callable[[int], None]) -> Iterator[None]:
    """Call `insist` when one of these signals has come, and the context has not been left in time."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    left = threading.Event()

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in numbers:
                if not left.wait(PATIENCE_SECONDS):
                    insist(number[0])
                break

    thread = threading.Thread(target=watch, daemon=True, name="interruption")
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        os.close(writing)
        thread.join()
        os.close(reading)


class Outputs:
    """What a tool is to write, as it was before the work."""

    def __init__(self, paths: Iterable[Path]):
        paths = list(paths)
        self.streams = [path for path in paths if is_stream(path)]
        self.before = {path: trace(path) for path in paths if path not in self.streams}

    def sentence(self) -> str:
        """What an interruption has left of them. Nothing is said of outputs where there are none."""
        after = {path: trace(path) for path in self.before}
        if broken := [path for path, found in after.items() if found is None and self.before[path] is not None]:
            return f"interrupted while {named(broken)} was being replaced, which is not whole now; start again"
        if written := [path for path, found in after.items() if found != self.before[path]]:
            return f"interrupted; {named(written)} was written"
        if kept := [path for path, found in after.items() if found is not None]:
            return f"interrupted; nothing was written, {named(kept)} is as it was"
        if self.streams:
            return f"interrupted; what {named(self.streams)} got is not whole"
        return "interrupted; nothing was written" if after else "interrupted"


def trace(path: Path) -> tuple[int, int] | None:
    """What changes when a file or folder is replaced; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def named(paths: Iterable[Path]) -> str:
    """Paths in a sentence."""
    return " and ".join(map(str, paths))


def end_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    """A signal handler for the seconds in which a tool is imported: nothing is there yet, and an exception may be lost
    in a library's own handling of them."""
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(128 + number)


def be_quick_while_importing() -> None:
    """End at Ctrl-C with a word, not a traceback, where the process is a tool (until `run_tool`) or a training command
    (until its `StopRequest`)."""
    script = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    is_ours = Path(script).parent.name in ("tools", "deberta_xl")
    is_main = threading.current_thread() is threading.main_thread()
    if is_ours and is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
