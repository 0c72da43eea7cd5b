"""A heartbeat file per rank: which step and phase it is in, and since when. Watchdogs and people read it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

INTERVAL_SECONDS = 1.0


class Heartbeat:
    """Keeps `heartbeat/rank-00000.json` current; the file is written beside the work, at most once a second."""

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:05d}.json"
        self.beat = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": 0, "phase": "start"}
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
        """Write the last mark whenever it changed, until closed."""
        written = self.beat
        while not self.stopped.wait(INTERVAL_SECONDS):
            if self.beat is not written:
                written = self.beat
                self.write()

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
