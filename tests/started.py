"""The repository's scripts as a user types them, on forked ranks, which need not import torch: a second or two each.

    ended = start(ROOT / "deberta_xl" / "pretrain.py", ["--config", "debug", ...], num_ranks=2)
    assert ended.returncode == 0, ended.stdout

What a launcher and a fresh interpreter do besides is not in it: a test of that starts real processes.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from ranks import free_port, new_process, rank_environment

from deberta_xl.training.state import TrainState

ROOT = Path(__file__).parent.parent
PRETRAIN = ROOT / "deberta_xl" / "pretrain.py"


class Ended(NamedTuple):
    """What came of a start."""

    returncode: int
    """0 where all ranks gave that, otherwise the first other one."""
    stdout: str
    """What the ranks said, errors too, one after the other."""


def start(
    script: Path,
    given: Sequence[str],
    num_ranks: int = 1,
    *,
    folder: Path | None = None,
    stop_after: int | None = None,
    timeout: float = 200.0,
) -> Ended:
    """`script` with the arguments `given`, in `folder` if not here, to the end of all ranks.

    One rank is started as by plain `python`, several as by a launcher. `stop_after` asks a run to stop: after this step
    the last rank, and no other, receives USR1. Who takes longer than `timeout` seconds is killed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as place:
        said = [Path(place) / f"rank-{rank}" for rank in range(num_ranks)]
        processes = []
        for rank, path in enumerate(said):
            stops = stop_after if rank == num_ranks - 1 else None
            process = new_process(live, script, [str(word) for word in given], folder, path, stops)
            launched = rank_environment(rank, num_ranks, port) if num_ranks > 1 else {}
            with mock.patch.dict(os.environ, launched):
                process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        return Ended(next(filter(None, codes), 0), "".join(path.read_text(errors="replace") for path in said))


def live(script: Path, given: list[str], folder: Path | None, said: Path, stop_after: int | None) -> None:
    """The life of a rank: what `python SCRIPT GIVEN` does."""
    gc.freeze()  # as in `ranks.py`
    os.chdir(folder or Path.cwd())
    sys.stdout = sys.stderr = said.open("w", encoding="utf-8", buffering=1)
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    sys.argv = [str(script), *given]
    sys.path.insert(0, str(script.parent))
    advance = TrainState.advance

    def advance_and_stop(state: TrainState, count: int, **facts: bool) -> None:
        advance(state, count, **facts)
        if state.step == stop_after:
            os.kill(os.getpid(), signal.SIGUSR1)

    with mock.patch.object(TrainState, "advance", advance_and_stop):
        runpy.run_path(str(script), run_name="__main__")
