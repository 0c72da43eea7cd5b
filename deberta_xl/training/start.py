"""What every training command does between its checked inputs and its loop: process group, run folder, engine."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from deberta_xl.base.errors import ConfigError, UserError
from deberta_xl.base.launch import Launch
from deberta_xl.base.log import log_to_file, rank_zero
from deberta_xl.checkpoint.fragments import canonical_parameters, set_master_weights
from deberta_xl.checkpoint.store import load_checkpoint
from deberta_xl.checkpoint.together import gathered, on_rank_zero, rank_and_size
from deberta_xl.model.trunk import Trunk
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.stages import Split
from deberta_xl.run.devices import describe_devices, device_name, device_versions, refuse_gpu_without_kernels
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.ownership import Ownership
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.mask import Mask
from deberta_xl.settings.platform import Platform
from deberta_xl.settings.pretraining import RunConfig, ScheduleSection
from deberta_xl.training.engine import build_engine, check_precision, start_engine_runtime
from deberta_xl.training.state import TrainState
from deberta_xl.training.take_over import take_over


class RunInputs(Protocol):
    """What is needed of a command's inputs."""

    config: RunConfig | FinetuneConfig
    engine: DeepSpeedConfig
    launch: Launch
    grid: Grid
    tokenizer_folder: Path
    total_steps: int
    schedule: ScheduleSection
    mask: Mask
    split: Split | None

    @property
    def platform(self) -> Platform:
        """What the ranks compute on."""


class Start(NamedTuple):
    """A run that has its ranks and its folder, and no engine yet."""

    groups: Groups
    folder: RunFolder
    is_first: bool
    """Whether the folder was nobody's before."""
    newest: Path | None
    """The checkpoint to go on from; None for a new run."""
    ownership: Ownership
    heartbeat: Heartbeat

    @contextlib.contextmanager
    def undone_when_refused(self) -> Iterator[None]:
        """A refusal (UserError) inside leaves no run folder behind, where this start has made it."""
        try:
            yield
        except UserError:
            if self.is_first and not self.ownership.is_lost():
                self.heartbeat.close()  # on every rank: it would write on
                if rank_and_size()[0] == 0:
                    self.folder.discard()
            raise


def start_run(inputs: RunInputs, fingerprints: Mapping[str, Any]) -> Start:
    """Join the process group and take over the run folder. Collective.

    `fingerprints` is what a checkpoint must agree with; with the run's last step behind its own it is refused, too.
    """
    config, launch, engine = inputs.config, inputs.launch, inputs.engine
    start_engine_runtime(launch, engine.precision, deterministic=config.train.deterministic)
    refuse_gpu_without_kernels()
    check_precision(engine.precision)
    devices = gathered(device_name)
    rank_zero("devices: %s", describe_devices(devices, device_versions()))
    folder = RunFolder(config.run.folder)
    facts = {
        "command": sys.argv,
        "world_size": launch.world_size,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "devices": Counter(devices),
    }
    is_first = on_rank_zero(folder.is_unused)
    taken = take_over(
        folder, config, inputs.tokenizer_folder, fingerprints=fingerprints, last_step=inputs.total_steps, facts=facts
    )
    log_to_file(folder.log / f"rank-{launch.rank:05d}.log")
    torch.manual_seed(config.train.seed)
    return Start(build_groups(inputs.grid), folder, is_first, *taken)


def start_engine(
    inputs: RunInputs,
    start: Start,
    model: nn.Module,
    learners: Mapping[str, float],
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> tuple[DeepSpeedEngine, TrainState]:
    """The engine over `model`, divided over the ranks, and the state of the run it continues, if any. Collective.

    `learners` are the objective's. `wrap` makes what the engine holds of the divided model, where that is not the model
    itself: a stage of a pipeline.
    """
    config, grid = inputs.config, inputs.grid
    trunks = [module for module in model.modules() if isinstance(module, Trunk)]
    check_divisible_model(model, trunks, grid)
    if kernels := {trunk.use_kernel(config.model.kernel, inputs.mask, inputs.platform) for trunk in trunks}:
        rank_zero("attention: %s kernel", " and ".join(sorted(kernels)))
    if config.train.activation_checkpointing:
        for trunk in trunks:
            trunk.checkpoint_activations()
    divide(model, start.groups, sequence_parallel=config.parallel.sequence_parallel)
    is_new = start.newest is None
    # The engine gives every parameter other memory, and leaves what it was built of as it is: no copy is needed.
    weights = {name: p.detach() for name, p in model.named_parameters()} if is_new else {}
    settings = inputs.engine.engine_dict(grid.data_parallel_size, config)
    engine = build_engine(wrap(model) if wrap else model, config.optimizer, settings, start.groups, learners)
    if is_new:
        set_master_weights(engine, canonical_parameters(engine), weights)
        return engine, TrainState()
    tensor_parallel = (grid.tensor_parallel_size, grid.tensor_parallel_rank)
    saved = load_checkpoint(engine, start.newest, tensor_parallel=tensor_parallel)
    state = TrainState(**{key: value for key, value in saved.items() if key != "fingerprints"})
    rank_zero("resumed from %s: step %d", start.newest, state.step)
    return engine, state


def check_divisible_model(model: nn.Module, trunks: Sequence[Trunk], grid: Grid) -> None:
    """Refuse to divide a model of which the plan knows nothing. Raises ConfigError."""
    if grid.tensor_parallel_size > 1 and not trunks:
        raise ConfigError(
            f"parallel.tensor_parallel_size={grid.tensor_parallel_size} divides a Trunk (deberta_xl/model/trunk.py), "
            f"and {type(model).__name__} neither is nor has one: let it inherit from Trunk, or leave the size at 1"
        )
