"""A heartbeat file per rank: which step and phase it is in, and since when. Watchdogs and people read it.

The content changes with the work, the file's time every few seconds as long as the process runs at all: so a rank
that is stopped or gone can be told from one that waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from deberta_xl.launch import node_name
from deberta_xl.log import logger
from deberta_xl.training.ownership import Ownership

INTERVAL_SECONDS = 1.0
ALIVE_INTERVALS = 5
"""Intervals between two signs of life, and between two looks at whose folder it is."""
TAKEN_OVER = 3
"""Exit status of a rank whose folder another start has."""


class Heartbeat:
    """Keeps `heartbeat/rank-00000.json` current; the file is written beside the work, at most once a second.

    Ends the process when another start has taken the folder: a rank that waits for dead peers would do so for ever.
    """

    def __init__(self, folder: Path, rank: int, ownership: Ownership):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:05d}.json"
        self.ownership = ownership
        self.beat = {"rank": rank, "host": node_name(), "pid": os.getpid(), "step": 0, "phase": "start"}
        self.stopped = threading.Event()
        self.mark(0, "start")
        self.write()
        self.thread = threading.Thread(target=self.keep_writing, name="heartbeat", daemon=True)
        self.thread.start()

    @property
    def step(self) -> int:
        """The step this rank is in."""
        return self.beat["step"]

    @property
    def phase(self) -> str:
        """What this rank does: start, data, forward-backward, optimizer, evaluation, checkpoint, done."""
        return self.beat["phase"]

    def mark(self, step: int, phase: str) -> None:
        """This rank enters `phase` of `step` now."""
        self.beat = {**self.beat, "step": step, "phase": phase, "time": time.time()}

    def keep_writing(self) -> None:
        """Write the last mark whenever it changed, and a sign of life now and then, until closed."""
        written, intervals = self.beat, 0
        while not self.stopped.wait(INTERVAL_SECONDS):
            intervals += 1
            if self.beat is not written:
                written = self.beat
                self.write()
            if intervals % ALIVE_INTERVALS == 0:
                self.leave_if_taken_over()
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def leave_if_taken_over(self) -> None:
        """End this process at once, without another word to the folder, when it is another start's."""
        if self.ownership.is_lost():
            logger.error("%s names another start of this run: this one ends", self.ownership.file)
            os._exit(TAKEN_OVER)

    def write(self) -> None:
        """Write the file in one piece. A full disk must not end a run for the sake of its heartbeat."""
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(self.beat))
            os.replace(partial, self.path)
        except OSError:
            return

    def close(self) -> None:
        """Write the last mark and stop."""
        self.stopped.set()
        self.thread.join()
        self.write()
