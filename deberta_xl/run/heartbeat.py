"""A heartbeat file per rank: which step and phase it is in, and since when. Watchdogs and people read it.

The content changes with the work: at every mark, and at every batch, file or piece of a large file within a phase
(base/signs.py). The file's time changes every few seconds as long as the process runs at all: so a rank that is stopped
or gone can be told from one that waits for it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deberta_xl.base import signs
from deberta_xl.base.launch import node_name
from deberta_xl.base.log import logger
from deberta_xl.base.screen import screen

if TYPE_CHECKING:
    from deberta_xl.run.ownership import Ownership

INTERVAL_SECONDS = 1.0
ALIVE_INTERVALS = 5
"""Intervals between two signs of life, and between two looks at whose folder it is."""
FILES_PER_SECOND = 200
"""What all ranks together write: of more of them each writes less often, since one server has all names of a folder."""
TAKEN_OVER = 3
"""Exit status of a rank whose folder another start has."""


class Heartbeat:
    """Keeps `heartbeat/rank-00000.json` current; the file is written beside the work, at most once a second (`pace`).

    Ends the process when another start has taken the folder: a rank that waits for dead peers would do so for ever.
    """

    def __init__(self, folder: Path, rank: int, ownership: Ownership, world_size: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.world_size = beat_file(folder, rank), world_size
        self.ownership = ownership
        self.beat = first_beat(rank)
        self.marked = time.monotonic()
        self.stopped = threading.Event()
        self.write()
        signs.listen(self)
        self.thread = threading.Thread(target=self.keep_writing, name="heartbeat", daemon=True)
        self.thread.start()

    @property
    def step(self) -> int:
        """The step this rank is in."""
        return self.beat["step"]

    @property
    def phase(self) -> str:
        """What this rank does: start, data, forward-backward, optimizer, evaluation, checkpoint, best weights;
        at last stopped or done."""
        return self.beat["phase"]

    def mark(self, step: int, phase: str) -> None:
        """This rank enters `phase` of `step` now."""
        turn = self.beat["turn"] + 1 if step == self.beat["step"] else 0
        self.renew(step=step, phase=phase, turn=turn, units=0, waits=False)

    def moved(self) -> None:
        """A unit of the phase's work is done."""
        self.renew(units=self.beat["units"] + 1, waits=False)

    def waits(self) -> None:
        """This rank's part of the phase's work is done."""
        self.renew(waits=True)

    def renew(self, **changes: Any) -> None:
        """Something has changed now."""
        self.beat, self.marked = {**self.beat, **changes, "time": time.time()}, time.monotonic()

    def keep_writing(self) -> None:
        """Write the last mark whenever it changed, and a sign of life now and then, until closed."""
        written, intervals = self.beat, 0
        seconds, alive_intervals = pace(self.world_size)
        while not self.stopped.wait(seconds):
            intervals += 1
            is_sign_due = intervals % alive_intervals == 0
            if is_sign_due:
                self.leave_if_taken_over()
            if is_sign_due or self.beat is not written:
                written = self.beat
                self.write()

    def leave_if_taken_over(self) -> None:
        """End this process at once, without another word to the folder, when it is another start's."""
        if self.ownership.is_lost():
            owner = self.ownership.describe_owner()
            logger.error("%s names another start of this run (%s): this one ends", self.ownership.file, owner)
            screen.close()
            os._exit(TAKEN_OVER)

    def write(self) -> None:
        """Write the last mark, and how old it is: with the file's own time that tells when it was, by one clock."""
        write_beat(self.path, {**self.beat, "age": round(time.monotonic() - self.marked, 3)})

    def close(self) -> None:
        """Write the last mark and stop."""
        signs.listen(None)
        self.stopped.set()
        self.thread.join()
        self.write()


def pace(world_size: int) -> tuple[float, int]:
    """Seconds between two looks whether there is something to write, and how many looks a sign of life is due after."""
    slower = min(ALIVE_INTERVALS, max(1, round(world_size / FILES_PER_SECOND)))
    return INTERVAL_SECONDS * slower, ALIVE_INTERVALS // slower


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat stands."""
    return folder / f"rank-{rank:05d}.json"


def first_beat(rank: int) -> dict[str, Any]:
    """What a heartbeat says in the first moment.

    `turn` counts the phases of the step, `units` what was done in this one; `waits` is true once a rank has done its
    part of something collective.
    """
    process = {"rank": rank, "host": node_name(), "pid": os.getpid()}
    return {**process, "step": 0, "phase": "start", "turn": 0, "units": 0, "waits": False, "time": time.time()}


def write_beat(file: Path, beat: Mapping[str, Any]) -> None:
    """Write a heartbeat in one piece. A full disk must not end a run for the sake of its heartbeat."""
    partial = file.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(beat))
        os.replace(partial, file)
    except OSError:
        return
