"""What every training command reads and checks before torch is imported, and how it tells what it is going to do."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deberta_xl.base.errors import counted
from deberta_xl.base.launch import Launch
from deberta_xl.base.log import rank_zero
from deberta_xl.commands.arguments import launch_of
from deberta_xl.commands.outlook import print_memory, print_outlook
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.kernels.registry import Demand, choose_kernel
from deberta_xl.parallel.grid import Grid, check_divisible
from deberta_xl.parallel.stages import Split
from deberta_xl.planning.hardware import device_gibibytes, planned_platform
from deberta_xl.planning.outlook import Outlook
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig, load_deepspeed_config
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.mask import Mask
from deberta_xl.settings.platform import Platform
from deberta_xl.settings.pretraining import RunConfig, ScheduleSection

if TYPE_CHECKING:
    from deberta_xl.objectives.objective import Objective


class Layout(NamedTuple):
    """On what a run takes place."""

    engine: DeepSpeedConfig
    launch: Launch
    grid: Grid


def read_layout(arguments: argparse.Namespace, config: RunConfig | FinetuneConfig) -> Layout:
    """The engine's settings, the launcher's ranks and their grid, in agreement with `config`. Raises UserError."""
    engine = load_deepspeed_config(arguments.deepspeed_config, config)
    launch = launch_of(arguments)
    grid = Grid.for_run(launch.rank, launch.world_size, config.parallel)
    engine.agree(grid.data_parallel_size, config)
    device_gibibytes()  # refused here where it is none, not when it is told
    return Layout(engine, launch, grid)


def check_model(
    architecture: DebertaConfig,
    layout: Layout,
    config: RunConfig | FinetuneConfig,
    mask: Mask = "bidirectional",
    section: str = "model",
) -> None:
    """Refuse a model that does not divide over the ranks, or that the kernel cannot compute under a mask; `section` has
    its sizes.

    Raises ConfigError.
    """
    check_divisible(architecture, layout.grid.tensor_parallel_size, section)
    choose_kernel(config.model.kernel, Demand(architecture, mask, planned_platform(layout.engine)))


class Words(NamedTuple):
    """What only the one command or the other can tell of a run."""

    model: str
    """What the model is, beside its size."""
    batch: str
    """What a step reads."""
    data: str
    """How much is read in all, of what."""


@dataclass(frozen=True, kw_only=True)
class Inputs(ABC):
    """Everything that a run is assembled from, checked."""

    config: RunConfig | FinetuneConfig
    engine: DeepSpeedConfig
    launch: Launch
    grid: Grid
    tokenizer: Tokenizer
    tokenizer_folder: Path
    architecture: DebertaConfig
    total_steps: int
    """Optimizer updates of the run."""
    schedule: ScheduleSection
    mask: Mask = "bidirectional"
    """What attention is asked for."""
    split: Split | None = None
    """How the model is spread over stages, where it can be."""

    @abstractmethod
    def objective(self) -> Objective:
        """What is learned. Imports torch."""

    @property
    def platform(self) -> Platform:
        """What the ranks compute on."""
        return planned_platform(self.engine)

    @property
    @abstractmethod
    def outlook(self) -> Outlook:
        """What the run takes."""

    @abstractmethod
    def words(self) -> Words:
        """The run in words."""

    @abstractmethod
    def print_more(self) -> None:
        """Whatever else is to be known of the run, on rank 0."""


def print_description(inputs: Inputs) -> None:
    """What the run is going to be: sizes, ranks, samples, on rank 0."""
    config, train, ranks = inputs.config, inputs.config.train, inputs.grid.data_parallel_size
    outlook, words = inputs.outlook, inputs.words()
    rank_zero("model: %s parameters, %s", f"{outlook.work.num_parameters:,}", words.model)
    sliced = ", sequence divided" if config.parallel.sequence_parallel else ""
    zero = f"ZeRO-{inputs.engine.zero_stage} in {inputs.engine.precision}"
    rank_zero("ranks: %s%s, %s", inputs.grid.describe(), sliced, zero)
    print_memory(outlook)
    rank_zero(
        "step: %s (micro-batch %d x %d accumulated x %s)",
        words.batch, train.micro_batch_size, train.gradient_accumulation_steps(ranks),
        counted(ranks, "replica"),
    )  # fmt: skip
    rank_zero("run: %s = %s", counted(inputs.total_steps, "step"), words.data)
    interval = counted(config.checkpoint.interval, "step").removeprefix("1 ")
    rank_zero("run folder: %s (checkpoint every %s)", config.run.folder, interval)
    inputs.print_more()
    print_outlook(outlook)
