"""How much memory a rank needs: parameters and their state exactly, activations by estimating what autograd keeps."""

from __future__ import annotations

from typing import NamedTuple

from deberta_xl.model.part_costs import Division
from deberta_xl.model.parts import num_parameters
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.stages import Split
from deberta_xl.planning.engine_memory import Held, engine_memory
from deberta_xl.planning.workload import Workload
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.pretraining import RunConfig

GIB = 2**30


class RankMemory(NamedTuple):
    """Bytes on the device of one rank."""

    num_parameters: int
    """Parameters this rank computes with."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    """What is reduced and gathered beside the activations."""
    update: float
    """What an update copies, when activations and buffers are gone."""

    @property
    def total(self) -> float:
        """All of it at its fullest; libraries and fragmentation take 1–3 GiB more on a GPU."""
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.buffers, self.update)

    def describe(self) -> str:
        """`1,566,915,075 parameters, 48.59 GiB (weights 2.92, gradients 5.84, optimizer 17.51, activations 21.96,
        buffers 0.37)`; with `update` in the place of the last two where that is more."""
        at_its_fullest = ("update",) if self.update > self.activations + self.buffers else ("activations", "buffers")
        names = ("weights", "gradients", "optimizer", *at_its_fullest)
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in names)
        return f"{self.num_parameters:,} parameters, {self.total / GIB:.2f} GiB ({parts})"


def estimate_memory(
    work: Workload, run: RunConfig | FinetuneConfig, engine: DeepSpeedConfig, grid: Grid, split: Split, kernel: str
) -> RankMemory:
    """What a rank of `grid`'s stage needs, if that kernel computes attention."""
    ranks = grid.tensor_parallel_size
    division = Division(engine.weight_bytes, kernel, ranks, ranks if run.parallel.sequence_parallel else 1)
    units = split.units(grid.stage)
    parts = [part for part in work.parts if any(unit in units for unit in part.units)]
    numel = num_parameters(parts, ranks)
    largest = max(parameter.numel(ranks) for part in parts for _, parameter in part.named_parameters())
    held = engine_memory(engine, Held(numel, largest, grid.data_parallel_size))
    return RankMemory(numel, **held._asdict(), activations=stage_activations(work, run, grid, split, division))


def stage_activations(
    work: Workload, run: RunConfig | FinetuneConfig, grid: Grid, split: Split, division: Division
) -> float:
    """What a stage keeps for the backward pass at its fullest, and the temporaries of the unit that has most."""
    load = (work.largest or work.example).times(run.train.micro_batch_size)
    recomputes = run.train.activation_checkpointing
    received = load.tokens * work.architecture.hidden_size * division.element_bytes
    # 1F1B: stage s has begun this many micro-batches before its first backward pass.
    in_flight = min(grid.num_stages - grid.stage, run.train.gradient_accumulation_steps(grid.data_parallel_size))
    fullest = 0.0
    for turn in work.turns:
        kept, working = 0.0, dict.fromkeys(split.units(grid.stage), 0.0)
        for part in work.parts:
            unit = part.units[-1]
            if unit in working and part.activations is not None and part.name.startswith(turn):
                taken = part.activations(load, division)
                kept += taken.entry if recomputes else taken.kept
                working[unit] += taken.working + (taken.kept if recomputes else 0.0)
        fullest = max(fullest, in_flight * work.kept_passes * (kept + received) + max(working.values()))
    return fullest
