"""Which start of a run its folder belongs to: the newest one. Every earlier one that is still alive ends itself.

A lost node goes on computing until somebody reaches it, and its job has started again elsewhere by then; two people
start the same run. The file OWNER names one start, all ranks of a start look at it every few seconds, and nothing is
published before another look.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from deberta_xl.errors import ConfigError
from deberta_xl.training.run_folder import RunFolder, make_folder, write_text

QUIET_SECONDS = 20.0
"""A start whose rank 0 gives no sign of life for so long (heartbeat.py: one every 5 s) is taken for dead."""
FORGOTTEN_SECONDS = 600.0
"""A sign of life older than this needs no second look, whatever the clocks of two machines make of each other."""


class Ownership:
    """A start's claim to a run folder."""

    def __init__(self, file: Path, claim: str):
        self.file, self.claim = file, claim

    def is_lost(self) -> bool:
        """Whether another start has the folder by now; a file that cannot be read at the moment says nothing."""
        try:
            return self.file.read_text(encoding="utf-8").strip() != self.claim
        except OSError:
            return False

    def check(self) -> None:
        """Raise ConfigError when the folder belongs to another start."""
        if self.is_lost():
            raise ConfigError(f"{self.file.parent} was taken over by another start of this run: see {self.file}")


def own_claim(environment: Mapping[str, str] = os.environ) -> str:
    """One line that no other start has; `slurm/lib/launch.sh` reads the job's number from it."""
    job, restart = environment.get("SLURM_JOB_ID"), environment.get("SLURM_RESTART_COUNT", "0")
    start = f"job {job}.{restart}" if job else "start"
    return f"{start} host {socket.gethostname()} process {os.getpid()} time {time.time_ns()}"


def claim_folder(folder: RunFolder, claim: str) -> str:
    """Make `claim` the owner; on rank 0. Raises ConfigError when another start is alive and no predecessor of ours."""
    before = read_owner(folder.owner)
    if before and not has_ended(folder, before, claim):
        sign = folder.heartbeat / "rank-00000.json"
        seen = changed_at(sign)
        deadline = time.monotonic() + QUIET_SECONDS
        while time.time() - seen < FORGOTTEN_SECONDS and time.monotonic() < deadline:
            time.sleep(0.5)
            if changed_at(sign) != seen:
                raise ConfigError(
                    f"run.folder={folder.path} is in use ({before}); end that start first, or choose another folder"
                )
    make_folder(folder.path)
    write_text(folder.owner, claim + "\n")
    return claim


def has_ended(folder: RunFolder, before: str, claim: str) -> bool:
    """Whether the start `before` has ended for certain, or is an earlier start of our own job, which slurm replaced."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads((folder.heartbeat / "rank-00000.json").read_bytes())["phase"] in ("stopped", "done"):
            return True
    old, new = (re.match(r"(?:job (\d+)\.\d+|start) host (\S+) process (\d+)", line) for line in (before, claim))
    if old is None or new is None or (old[1] and old[1] == new[1]):
        return True
    return old[2] == new[2] and not Path(f"/proc/{old[3]}").exists()


def read_owner(file: Path) -> str:
    """The line of an OWNER file, empty when there is none."""
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def changed_at(file: Path) -> float:
    """Time of a file's last change, 0 when there is none."""
    return file.stat().st_mtime if file.exists() else 0.0
