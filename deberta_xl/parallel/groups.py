"""The process groups of a run. megatron-core keeps them in globals: they are fed here, and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deberta_xl.parallel.grid import Grid


class Groups(NamedTuple):
    """This rank's groups; None stands for all ranks, where tensor parallelism is not used."""

    grid: Grid
    data_group: ProcessGroup | None = None
    """Ranks with the same slice of the model and other data."""
    tensor_group: ProcessGroup | None = None
    """Ranks with other slices of the same layers and the same data."""

    def model_parallel_unit(self) -> ModelParallelUnit | None:
        """What DeepSpeed asks for its groups (its `mpu` argument)."""
        return None if self.tensor_group is None else ModelParallelUnit(self)


def build_groups(grid: Grid) -> Groups:
    """Make the groups. Collective. megatron-core is imported only when layers are divided: it costs seconds."""
    if grid.tensor_parallel_size == 1:
        return Groups(grid)
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=grid.tensor_parallel_size)
    data_group = parallel_state.get_data_parallel_group()
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    assert dist.get_rank(data_group) == grid.data_parallel_rank
    assert dist.get_rank(tensor_group) == grid.tensor_parallel_rank
    return Groups(grid, data_group, tensor_group)


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface over our groups. Tensor parallelism is all of its model parallelism.

    Without it DeepSpeed partitions over all ranks, and the loss is silently wrong.
    """

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks over which ZeRO partitions."""
        return self.groups.data_group

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return self.groups.grid.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self.groups.grid.data_parallel_size

    def get_model_parallel_group(self) -> ProcessGroup:
        """Ranks that hold one replica together."""
        return self.groups.tensor_group

    def get_model_parallel_rank(self) -> int:
        """This rank among them."""
        return self.groups.grid.tensor_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self.groups.grid.tensor_parallel_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
