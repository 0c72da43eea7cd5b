"""Where each rank stands: which stage, which data-parallel replica, and which slice of every layer.

Ranks of one tensor-parallel group are neighbours, so that they lie within a node; stages are farthest apart, since they
exchange least. Pure arithmetic, without torch.
"""

from __future__ import annotations

from typing import NamedTuple

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import divisors
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.parallelism import ParallelSection


class Grid(NamedTuple):
    """One rank's place among all."""

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    stage: int = 0
    num_stages: int = 1

    @classmethod
    def of(cls, rank: int, world_size: int, tensor_parallel_size: int = 1, num_stages: int = 1) -> Grid:
        """The place of `rank`. Raises ConfigError when the ranks cannot be divided."""
        if world_size % (tensor_parallel_size * num_stages):
            raise ConfigError(refusal(world_size, tensor_parallel_size, num_stages))
        data_parallel_size = world_size // (tensor_parallel_size * num_stages)
        stage, within = divmod(rank, data_parallel_size * tensor_parallel_size)
        data_rank, tensor_rank = divmod(within, tensor_parallel_size)
        return cls(data_rank, data_parallel_size, tensor_rank, tensor_parallel_size, stage, num_stages)

    @classmethod
    def for_run(cls, rank: int, world_size: int, section: ParallelSection) -> Grid:
        """The place of `rank` in a run."""
        return cls.of(rank, world_size, section.tensor_parallel_size, section.pipeline_parallel_size)

    @property
    def rank(self) -> int:
        """The inverse of `of`."""
        row = self.stage * self.data_parallel_size + self.data_parallel_rank
        return row * self.tensor_parallel_size + self.tensor_parallel_rank

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_stages * self.data_parallel_size * self.tensor_parallel_size

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the enhanced mask decoder, and so the loss."""
        return self.stage == self.num_stages - 1

    @property
    def counts_labels(self) -> bool:
        """Whether this rank, of those that share a replica and see the same data, counts it."""
        return self.stage == 0 and self.tensor_parallel_rank == 0

    @property
    def reports_results(self) -> bool:
        """Whether this rank, of those that share a replica, tells its loss and guesses."""
        return self.is_last_stage and self.tensor_parallel_rank == 0

    def describe(self) -> str:
        """`8 = 2 pipeline stages x 2 data-parallel x 2 tensor-parallel`."""
        stages = f"{self.num_stages} pipeline stages x " if self.num_stages > 1 else ""
        return (
            f"{self.world_size} = {stages}{self.data_parallel_size} data-parallel x "
            f"{self.tensor_parallel_size} tensor-parallel"
        )


def refusal(world_size: int, tensor_parallel_size: int, num_stages: int) -> str:
    """Why the ranks cannot be divided, and what would do."""
    if num_stages == 1:
        return (
            f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide the {world_size} ranks; "
            f"choose one of {divisors(world_size)} or start another number of ranks"
        )
    product = tensor_parallel_size * num_stages
    return (
        f"parallel.tensor_parallel_size={tensor_parallel_size} x parallel.pipeline_parallel_size={num_stages} = "
        f"{product} does not divide the {world_size} ranks; choose sizes whose product is one of "
        f"{divisors(world_size)}, or start a multiple of {product} ranks"
    )


def check_divisible(config: DebertaConfig, tensor_parallel_size: int, section: str = "model") -> None:
    """Refuse a size that does not divide heads and inner widths, before anything is built.

    `section` is that of the settings which name them.
    """
    for name, value in (("num_heads", config.num_heads), ("intermediate_size", config.intermediate_size)):
        if value % tensor_parallel_size:
            allowed = [n for n in divisors(config.num_heads) if config.intermediate_size % n == 0]
            raise ConfigError(
                f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide {section}.{name}={value}; "
                f"choose one of {allowed}, or another {section}.{name}"
            )


def check_stages(config: DebertaConfig, num_stages: int) -> None:
    """Refuse more stages than layers, before anything is built."""
    if num_stages > config.num_layers:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={num_stages} is more than model.num_layers={config.num_layers}: a stage "
            f"needs at least one layer; choose 1 … {config.num_layers}"
        )
