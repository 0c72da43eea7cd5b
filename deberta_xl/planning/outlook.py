"""What a planned run takes, stage by stage and in all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from deberta_xl.kernels.registry import Demand, choose_kernel
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.stages import Split
from deberta_xl.planning.cost import MASTER_AND_MOMENTS
from deberta_xl.planning.memory import GIB, RankMemory, estimate_memory
from deberta_xl.planning.workload import Workload
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.platform import Platform
from deberta_xl.settings.pretraining import RunConfig

FITTING = 0.9
"""Share of a device that the estimate may fill; libraries and fragmentation take the rest."""


class Outlook(NamedTuple):
    """A run that is planned, for one paradigm or the other: what is computed, with which settings, on which ranks."""

    work: Workload
    config: RunConfig | FinetuneConfig
    engine: DeepSpeedConfig
    grid: Grid
    """Any rank's."""
    split: Split
    steps: int
    num_saves: int
    """Checkpoints that the run makes, at most."""
    platform: Platform
    """What the ranks compute on."""

    @property
    def flops(self) -> float:
        """Operations of the whole run."""
        batch = self.config.train.global_batch_size
        if isinstance(self.config, FinetuneConfig):
            return self.steps * self.work.step_flops(batch)
        return sum(
            (stretch.last_step + 1 - stretch.first_step) * self.work.in_rows_of(stretch.length).step_flops(batch)
            for stretch in self.config.stretches
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: float32 weight and Adam's two moments of every parameter."""
        return MASTER_AND_MOMENTS * self.work.num_parameters

    @property
    def num_checkpoints(self) -> int:
        """How many there are at a time: those kept and the one being written, or all that the run makes."""
        keep = self.config.checkpoint.keep
        best = isinstance(self.config, FinetuneConfig)  # fine-tuning keeps that besides
        return min(keep + best + 1, self.num_saves) if keep else self.num_saves

    @property
    def kernel(self) -> str:
        """What computes the attention."""
        return choose_kernel(self.config.model.kernel, Demand(self.work.architecture, self.work.mask, self.platform))

    def memory(self) -> list[RankMemory]:
        """What a rank of each stage needs; where rows grow longer, with the longest: of equally many tokens they take
        most."""
        stages = (self.grid._replace(stage=stage) for stage in range(self.grid.num_stages))
        return [
            estimate_memory(self.work, self.config, self.engine, stage, self.split, self.kernel) for stage in stages
        ]

    def largest_micro_batch(self, gibibytes: float, *, recomputes: bool) -> int | None:
        """The largest that divides the batch and is estimated to fit every stage; None when not even 1 does."""
        per_replica = self.config.train.global_batch_size // self.grid.data_parallel_size
        small = [n for n in range(1, math.isqrt(per_replica) + 1) if per_replica % n == 0]
        for size in sorted({*small, *(per_replica // n for n in small)}, reverse=True):
            train = replace(self.config.train, micro_batch_size=size, activation_checkpointing=recomputes)
            trial = self._replace(config=replace(self.config, train=train))
            if max(needed.total for needed in trial.memory()) <= FITTING * gibibytes * GIB:
                return size
        return None
