"""The process groups of a run. megatron-core keeps them in globals: they are fed here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deberta_xl.parallel.grid import Grid


class Groups(NamedTuple):
    """This rank's groups; None stands for all ranks, where layers are neither divided nor spread over stages."""

    grid: Grid
    data_group: ProcessGroup | None = None
    """Ranks with the same part of the model and other data."""
    tensor_group: ProcessGroup | None = None
    """Ranks with other slices of the same layers and the same data."""
    pipeline_group: ProcessGroup | None = None
    """Ranks with other layers, the same slices of them, and the same data."""

    def model_parallel_unit(self) -> ModelParallelUnit | None:
        """What DeepSpeed asks for its groups (its `mpu` argument); a pipeline brings its own."""
        is_needed = self.grid.tensor_parallel_size > 1 and self.grid.num_stages == 1
        return ModelParallelUnit(self) if is_needed else None


FAMILIES: Sequence[Callable[[Grid], Grid]] = (
    lambda place: place._replace(data_parallel_rank=0),
    lambda place: place._replace(tensor_parallel_rank=0),
    lambda place: place._replace(stage=0),
)
"""What the ranks of a data, a tensor and a pipeline group have in common: everything but one."""


def build_groups(grid: Grid) -> Groups:
    """Make the groups. Collective."""
    if grid.tensor_parallel_size == grid.num_stages == 1:
        return Groups(grid)
    make = megatron_groups if grid.tensor_parallel_size > 1 else own_groups
    groups = Groups(grid, *make(grid))
    for group, family in zip(groups[1:], FAMILIES, strict=True):
        assert dist.get_process_group_ranks(group) in families(grid, family)
    return groups


def families(grid: Grid, family: Callable[[Grid], Grid]) -> list[list[int]]:
    """The ranks of each group of a kind."""
    members: dict[Grid, list[int]] = {}
    for rank in range(dist.get_world_size()):
        place = Grid.of(rank, dist.get_world_size(), grid.tensor_parallel_size, grid.num_stages)
        members.setdefault(family(place), []).append(rank)
    return list(members.values())


def own_groups(grid: Grid) -> list[ProcessGroup]:
    """This rank's data, tensor and pipeline group. Every rank takes part in making every group."""
    return [dist.new_subgroups_by_enumeration(families(grid, family))[0] for family in FAMILIES]


def megatron_groups(grid: Grid) -> list[ProcessGroup]:
    """The same, made by megatron-core, some of whose functions know no others: a rank has one of each kind.

    It is imported only when layers are divided, since that costs seconds.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            grid.tensor_parallel_size, grid.num_stages, create_gloo_process_groups=False
        )
    return [
        parallel_state.get_data_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ]


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
