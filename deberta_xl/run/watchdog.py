"""Watches the heartbeats of a start from outside, and ends with status 3 when nothing has moved for too long.

python -m deberta_xl.run.watchdog runs/base/heartbeat --limit 900 --since runs/base/slurm/probe

Then it names the ranks to blame: those whose process gives no sign of life (stopped, gone, its node lost); if all do,
those that are behind, since the others wait for them; and where nobody is behind it says that. Needs no torch and next
to no time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deberta_xl.base.command_line import build_parser
from deberta_xl.base.log import configure_logging, logger
from deberta_xl.base.small_file import read_json

HUNG = 3
"""Exit status when the ranks hang."""
SILENT_SECONDS = 15.0
"""A process that lives touches its file every 5 s (heartbeat.py)."""
MOST_NAMED = 8
COUNTED_ALIKE = ("forward-backward", "evaluation")
"""Phases in which all ranks do equally many units; a file may be one rank's alone."""
LONG_BEFORE_SECONDS = 5.0
"""Ranks that fell still within this time fell still together."""
EQUALLY_FAR = (
    "all are equally far, none is behind: what they share hangs (the network, the file system), or one batch or file "
    "takes longer than the limit (WATCHDOG_SECONDS)"
)
ALONE = "its device or file system hangs, or one batch or file takes longer than the limit (WATCHDOG_SECONDS)"


class Beat(NamedTuple):
    """What one rank's file says."""

    rank: int
    host: str
    step: int
    phase: str
    marked: float
    """When it last got on, by the file system's clock."""
    alive: float
    """When the process last gave a sign of life, by the same clock."""
    turn: int = 0
    """Phases of this step that it has behind it."""
    units: int = 0
    """Batches, files or pieces of them that it has done in this phase."""
    waits: bool = False
    """Whether its own part of the phase is done."""
    stamp: float = 0.0
    """When it last got on, by its own clock: another one means that it has."""


def read_beats(folder: Path, since: float) -> list[Beat]:
    """The heartbeats that are not older than `since` (the file system's clock): older ones are of an earlier start."""
    beats = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            alive, content = path.stat().st_mtime, read_json(path)
        except (OSError, ValueError):
            continue  # being replaced
        if alive >= since:
            beats.append(as_beat(content, alive))
    return beats


def as_beat(content: Mapping[str, Any], alive: float) -> Beat:
    """What a heartbeat file of the time `alive` says."""
    marked = alive - content["age"] if "age" in content else alive
    place = (content["rank"], content["host"], content["step"], content["phase"])
    done = (content.get("turn", 0), content.get("units", 0), content.get("waits", False))
    return Beat(*place, marked, alive, *done, content["time"])


def blame(beats: Sequence[Beat]) -> tuple[str, list[Beat]]:
    """What is wrong with whom, after nothing has moved for a while. Signs of life are compared with each other only."""
    newest = max(beat.alive for beat in beats)
    silent = [beat for beat in beats if newest - beat.alive > SILENT_SECONDS]
    if silent:
        return "no sign of life", silent
    behind = furthest_behind(beats)
    if len(beats) == 1:
        return ALONE, behind
    return (EQUALLY_FAR if len(behind) == len(beats) else "the others wait"), behind


def furthest_behind(beats: Sequence[Beat]) -> list[Beat]:
    """Those that have done least of the work, and are not waiting themselves; all of them when none is behind."""
    first = min((beat.step, beat.turn) for beat in beats)
    behind = [beat for beat in beats if (beat.step, beat.turn) == first]
    behind = [beat for beat in behind if not beat.waits] or behind
    if all(beat.phase in COUNTED_ALIKE for beat in behind):
        fewest = min(beat.units for beat in behind)
        behind = [beat for beat in behind if beat.units == fewest]
    earliest = min(beat.marked for beat in behind)
    return [beat for beat in behind if beat.marked - earliest < LONG_BEFORE_SECONDS]


def describe(beats: Sequence[Beat], seconds: float) -> str:
    """One line that names what hangs."""
    if not beats:
        return f"no rank has begun in {seconds:.0f} s; look at the first nodes' logs, and at the network between them"
    why, guilty = blame(beats)
    names = [f"rank {b.rank} on {b.host} (step {b.step}, {b.phase})" for b in guilty[:MOST_NAMED]]
    more = [f"and {len(guilty) - MOST_NAMED} more"] if len(guilty) > MOST_NAMED else []
    return f"nothing has moved for {seconds:.0f} s: {', '.join([*names, *more])}: {why}"


def watch(folder: Path, since: float, limit_seconds: float) -> str:
    """Return, with words for people, once no rank has got on for `limit_seconds`."""
    marks: list[tuple[int, float]] = []
    moved = time.monotonic()
    while True:
        beats = read_beats(folder, since)
        if (now := [(beat.rank, beat.stamp) for beat in beats]) != marks:
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
