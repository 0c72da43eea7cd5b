"""Running a command to its end: what it has started has ended, too, when a signal has ended it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deberta_xl.base.interruption import Interrupted

GRACE_SECONDS = 60.0
"""Time for saving a checkpoint, after which a stopped command is killed."""
POLL_SECONDS = 0.05


def run_to_end(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    launchers: int = 0,
    when_stopping: Callable[[], None] = lambda: None,
) -> int:
    """Exit status of a command that starts its work through so many `launchers`, one by the other, or does it itself.

    Launchers never hear of Ctrl-C, only the work; when that has ended after a signal, they are ended, too.
    Raises Interrupted after all of them have ended, when a signal has come; `when_stopping` is called when it comes. A
    second signal kills them.
    """
    # Python leaves a signal alone that its parent ignores, and so does not show a traceback of a launcher's.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if launchers else None
    try:
        child = subprocess.Popen(command, env=environment)
    finally:
        if launchers:
            signal.signal(signal.SIGINT, before)
    try:
        return child.wait()
    except Interrupted as interruption:
        when_stopping()
        stop(child, interruption.number, launchers)
        raise


def stop(child: subprocess.Popen, number: int, launchers: int) -> None:
    """Pass a signal on, and wait; kill after GRACE_SECONDS, or at a second signal."""
    started = family(child.pid)
    work = started[launchers:] or started
    for process in work if launchers else work[:1]:
        process.send(signal.SIGTERM if launchers else number)
    deadline = time.monotonic() + GRACE_SECONDS
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while time.monotonic() < deadline and any(process.is_alive() for process in work):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        for process in (*started, *family(child.pid)):
            process.send(signal.SIGKILL)
        child.wait()
        for known, handler in before.items():
            signal.signal(known, handler)


class Process(NamedTuple):
    """A process, told from a later one of the same number by when it began."""

    number: int
    parent: int
    state: str
    began: str

    def is_alive(self) -> bool:
        """Whether it runs still, and is no corpse that its parent has not looked at."""
        now = process_of(self.number)
        return now is not None and now.began == self.began and now.state != "Z"

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.number, number)


def family(number: int) -> list[Process]:
    """A process and its descendants, parents first; none when it has ended."""
    children = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        if process := process_of(int(folder.name)):
            children[process.parent].append(process)
    found = [process for process in (process_of(number),) if process]
    for member in found:
        found += children[member.number]
    return found


def process_of(number: int) -> Process | None:
    """What the system says of a process; None when it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Process(number, parent=int(fields[1]), state=fields[0], began=fields[19])
