"""Which start of a run its folder belongs to: the newest one. Every earlier one that is still alive ends itself.

A lost node goes on computing until somebody reaches it, and its job has started again elsewhere by then; two people
start the same run. The file OWNER names one start, all ranks of a start look at it every few seconds, and nothing is
published, and no metric written, before another look.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import logger
from deberta_xl.base.small_file import read_json, read_small
from deberta_xl.run.heartbeat import beat_file, first_beat, write_beat
from deberta_xl.run.run_folder import RunFolder, make_folder, write_text, writing

QUIET_SECONDS = 20.0
"""A start whose rank 0 gives no sign of life for so long (heartbeat.py: one every 5 s) is taken for dead."""
FORGOTTEN_SECONDS = 600.0
"""A sign of life older than this, by the file system's clock, needs no second look."""


class Ownership:
    """A start's claim to a run folder."""

    def __init__(self, file: Path, claim: str):
        self.file, self.claim = file, claim

    def is_lost(self) -> bool:
        """Whether another start has the folder by now; a file that cannot be read at the moment says nothing."""
        owner = read_owner(self.file)
        return bool(owner) and owner != self.claim

    def check(self) -> None:
        """Raise ConfigError when the folder belongs to another start."""
        if self.is_lost():
            raise ConfigError(
                f"{self.file.parent} was taken over by another start of this run: {self.describe_owner()}; this one "
                "ends, and that one goes on from the newest checkpoint"
            )

    def describe_owner(self) -> str:
        """Whose folder it is, for people."""
        return describe_claim(read_owner(self.file))

    def give_back(self, before: str) -> None:
        """Leave the folder, in which nothing was done, to the start that had it `before` ("" for none)."""
        if self.is_lost():
            return
        if before:
            write_text(self.file, before + "\n")
        else:
            self.file.unlink(missing_ok=True)


def own_claim(environment: Mapping[str, str] = os.environ) -> str:
    """One line that no other start has; `slurm/lib/launch.sh` reads the job's number from it."""
    job, restart = environment.get("SLURM_JOB_ID"), environment.get("SLURM_RESTART_COUNT", "0")
    start = f"job {job}.{restart}" if job else "start"
    return f"{start} host {socket.gethostname()} process {os.getpid()} time {time.time_ns()}"


def describe_claim(claim: str) -> str:
    """A claim for people: the time as a date."""

    def dated(found: re.Match[str]) -> str:
        return time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(int(found[1]) / 1e9))

    return re.sub(r"\btime (\d{1,19})$", dated, claim)


def claim_folder(folder: RunFolder, claim: str) -> str:
    """Make `claim` the owner; on rank 0. Raises ConfigError when another start is alive and no predecessor of ours.

    The claim's first sign of life is there before its name is, so that nobody takes it for dead while it starts.
    """
    before = read_owner(folder.owner)
    if before and not has_ended(folder, before, claim):
        wait_for_silence(folder, before)
        if read_owner(folder.owner) != before:
            return claim_folder(folder, claim)  # a third start has claimed it meanwhile
    make_folder(folder.path)
    make_folder(folder.heartbeat)
    write_beat(beat_file(folder.heartbeat, 0), first_beat(0))
    write_text(folder.owner, claim + "\n")
    return claim


def wait_for_silence(folder: RunFolder, owner: str) -> None:
    """Return when rank 0 of the start `owner` gives no sign of life; raise ConfigError when it does.

    Times of files are compared with each other only: the clock of this machine may be any other.
    """
    sign = beat_file(folder.heartbeat, 0)
    seen = changed_at(sign)
    if file_system_time(folder.path) - seen > FORGOTTEN_SECONDS:
        return
    logger.info("%s was last used by %s: waiting for a sign of life", folder.path, describe_claim(owner))
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if changed_at(sign) != seen:
            raise ConfigError(
                f"run.folder={folder.path} is in use ({describe_claim(owner)}); end that start first, or choose "
                "another folder"
            )


def has_ended(folder: RunFolder, before: str, claim: str) -> bool:
    """Whether the start `before` has ended for certain, or is an earlier start of our own job, which slurm replaced."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if read_json(beat_file(folder.heartbeat, 0))["phase"] in ("stopped", "done"):
            return True
    old, new = (re.match(r"(?:job (\d+)\.\d+|start) host (\S+) process (\d+)", line) for line in (before, claim))
    if old is None or new is None or (old[1] and old[1] == new[1]):
        return True
    return old[2] == new[2] and not Path(f"/proc/{old[3]}").exists()


def read_owner(file: Path) -> str:
    """The line of an OWNER file, empty when there is none that can be read."""
    try:
        return read_small(file).decode(errors="replace").strip() if file.is_file() else ""
    except OSError:
        return ""


def changed_at(file: Path) -> float:
    """Time of a file's last change, 0 when there is none."""
    return file.stat().st_mtime if file.exists() else 0.0


def file_system_time(folder: Path) -> float:
    """The time that `folder`'s file system gives a file that is written now."""
    with writing(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        return os.fstat(file.fileno()).st_mtime
