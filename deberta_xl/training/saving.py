"""When a run's state is saved, and how. All ranks do it together."""

from __future__ import annotations

import time
from dataclasses import asdict

import deepspeed

from deberta_xl.base.durations import duration
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.store import save_checkpoint
from deberta_xl.checkpoint.together import on_rank_zero
from deberta_xl.objectives.objective import Objective
from deberta_xl.parallel.grid import Grid
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.ownership import Ownership
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.training.safeguard import Safeguard
from deberta_xl.training.state import TrainState


class Saver:
    """Writes the checkpoints of a run; a safeguard holds them back, and drops the oldest ones."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, objective: Objective, grid: Grid, folder: RunFolder, state: TrainState,
        safeguard: Safeguard, heartbeat: Heartbeat, ownership: Ownership,
    ):  # fmt: skip
        self.engine, self.folder, self.state = engine, folder, state
        self.safeguard, self.heartbeat, self.ownership = safeguard, heartbeat, ownership
        self.tensor_parallel = grid.tensor_parallel_size, grid.tensor_parallel_rank
        self.objective, self.fingerprints = objective, dict(objective.fingerprints)
        self.saved_step = state.step
        self.is_owed = False

    def save_when(self, is_due: bool) -> None:
        """Save where it is due, or was and could not be. Collective."""
        self.is_owed |= is_due
        if self.is_owed and self.safeguard.may_save():
            self.save()

    def save_rest(self) -> None:
        """Save what was not saved yet. Collective."""
        self.save_when(self.saved_step != self.state.step)

    def save(self) -> None:
        """Write a checkpoint of this step. Collective."""
        self.heartbeat.mark(self.state.step, "checkpoint")
        start = time.perf_counter()
        on_rank_zero(self.ownership.check)
        folder = save_checkpoint(
            self.engine,
            self.folder.checkpoints,
            {**asdict(self.state), "fingerprints": self.fingerprints},
            extra_files=self.objective.checkpoint_files(self.state.step),
            tensor_parallel=self.tensor_parallel,
            before_publishing=self.ownership.check,  # once more: minutes may have passed
        )
        on_rank_zero(lambda: self.folder.write_latest(folder))
        self.safeguard.saved(folder)
        self.saved_step, self.is_owed = self.state.step, False
        rank_zero("checkpoint %s written in %s", folder, duration(time.perf_counter() - start))
