"""Watches the heartbeats of a start from outside, and ends with status 3 when nothing has moved for too long.

python -m deberta_xl.training.watchdog runs/base/heartbeat --limit 900 --since runs/base/slurm/probe

Then it names the ranks to blame: those whose process gives no sign of life (stopped, gone, its node lost); if all do,
those that are furthest behind, since the others wait for them. Needs no torch and next to no time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deberta_xl.command_line import build_parser
from deberta_xl.log import configure_logging, logger

HUNG = 3
"""Exit status when the ranks hang."""
SILENT_SECONDS = 15.0
"""A process that lives touches its file every 5 s (heartbeat.py)."""
MOST_NAMED = 8


class Beat(NamedTuple):
    """What one rank's file says."""

    rank: int
    host: str
    step: int
    phase: str
    marked: float
    """When the phase began, by the rank's own clock."""
    alive: float
    """When the process last gave a sign of life, by the file system's clock."""


def read_beats(folder: Path, since: float) -> list[Beat]:
    """The heartbeats that are not older than `since` (the file system's clock): older ones are of an earlier start."""
    beats = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            alive, content = path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # being replaced
        if alive >= since:
            beats.append(
                Beat(content["rank"], content["host"], content["step"], content["phase"], content["time"], alive)
            )
    return beats


def blame(beats: Sequence[Beat]) -> tuple[str, list[Beat]]:
    """What is wrong with whom, after nothing has moved for a while. Signs of life are compared with each other only."""
    newest = max(beat.alive for beat in beats)
    silent = [beat for beat in beats if newest - beat.alive > SILENT_SECONDS]
    if silent:
        return "no sign of life", silent
    first = min(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step == first]
    earliest = min(beat.marked for beat in behind)
    return "the others wait", [beat for beat in behind if beat.marked - earliest < 1.0]


def describe(beats: Sequence[Beat], seconds: float) -> str:
    """One line that names what hangs."""
    if not beats:
        return f"no rank has begun in {seconds:.0f} s; look at the first nodes' logs, and at the network between them"
    why, guilty = blame(beats)
    names = [f"rank {b.rank} on {b.host} (step {b.step}, {b.phase})" for b in guilty[:MOST_NAMED]]
    more = [f"and {len(guilty) - MOST_NAMED} more"] if len(guilty) > MOST_NAMED else []
    return f"nothing has moved for {seconds:.0f} s: {', '.join([*names, *more])}: {why}"


def watch(folder: Path, since: float, limit_seconds: float) -> str:
    """Return, with words for people, once no rank's mark has changed for `limit_seconds`."""
    marks: list[tuple[int, float]] = []
    moved = time.monotonic()
    while True:
        beats = read_beats(folder, since)
        if (now := [(beat.rank, beat.marked) for beat in beats]) != marks:
            marks, moved = now, time.monotonic()
        if (seconds := time.monotonic() - moved) > limit_seconds:
            return describe(beats, seconds)
        time.sleep(min(5.0, limit_seconds / 10))


def main() -> None:
    """The command."""
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=Path, help="the run folder's heartbeat/")
    parser.add_argument("--limit", type=float, required=True, help="seconds without any progress")
    parser.add_argument("--since", type=Path, required=True, help="a file of the time when the start began")
    arguments = parser.parse_args()
    configure_logging()
    since = arguments.since.stat().st_mtime
    logger.error("watchdog: %s", watch(arguments.folder, since, arguments.limit))
    sys.exit(HUNG)


if __name__ == "__main__":
    main()
