"""Where each rank stands: which data-parallel replica, and which slice of every layer.

Ranks of one tensor-parallel group are neighbours, so that they lie within a node. Pure arithmetic, without torch.
"""

from __future__ import annotations

from typing import NamedTuple

from deberta_xl.architecture import DebertaConfig
from deberta_xl.errors import ConfigError
from deberta_xl.strict import divisors


class Grid(NamedTuple):
    """One rank's place among all."""

    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1

    @classmethod
    def of(cls, rank: int, world_size: int, tensor_parallel_size: int) -> Grid:
        """The place of `rank`. Raises ConfigError when the ranks cannot be divided."""
        if world_size % tensor_parallel_size:
            raise ConfigError(
                f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide the {world_size} ranks; "
                f"choose one of {divisors(world_size)} or start another number of ranks"
            )
        data_rank, tensor_rank = divmod(rank, tensor_parallel_size)
        return cls(data_rank, world_size // tensor_parallel_size, tensor_rank, tensor_parallel_size)


def check_divisible(config: DebertaConfig, tensor_parallel_size: int) -> None:
    """Refuse a size that does not divide heads and inner widths, before anything is built."""
    for name, value in (("num_heads", config.num_heads), ("intermediate_size", config.intermediate_size)):
        if value % tensor_parallel_size:
            allowed = [n for n in divisors(config.num_heads) if config.intermediate_size % n == 0]
            raise ConfigError(
                f"parallel.tensor_parallel_size={tensor_parallel_size} does not divide model.{name}={value}; "
                f"choose one of {allowed}"
            )
