"""The process groups of a run: those that are used, each made once. megatron-core is fed its global one here, and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.host_group import patience


class Groups(NamedTuple):
    """This rank's groups; None stands for all ranks, where layers are neither divided nor spread over stages."""

    grid: Grid
    data_group: ProcessGroup | None = None
    """Ranks with the same part of the model and other data; this one alone, where there is one replica."""
    tensor_group: ProcessGroup | None = None
    """Ranks with other slices of the same layers and the same data; None where layers are whole."""
    pipeline_group: ProcessGroup | None = None
    """Ranks with other layers, the same slices of them, and the same data; None without stages."""
    replica_group: ProcessGroup | None = None
    """Ranks that hold the whole model together."""
    ends_group: ProcessGroup | None = None
    """The first and the last stage of this pipeline, which share the word table; None on the stages between."""

    def model_parallel_unit(self) -> ModelParallelUnit | None:
        """What DeepSpeed asks for its groups (its `mpu` argument); a pipeline brings its own."""
        is_needed = self.grid.tensor_parallel_size > 1 and self.grid.num_stages == 1
        return ModelParallelUnit(self) if is_needed else None


Partition = tuple[tuple[int, ...], ...]
"""Ranks, ascending, of each of several groups that have none in common."""


def build_groups(grid: Grid) -> Groups:
    """Make the groups. Collective."""
    if grid.tensor_parallel_size == grid.num_stages == 1:
        return Groups(grid)
    is_divided, has_stages = grid.tensor_parallel_size > 1, grid.num_stages > 1
    made: dict[Partition, ProcessGroup | None] = {(tuple(range(grid.world_size)),): dist.group.WORLD}

    def own(common: Callable[[Grid], Grid | None]) -> ProcessGroup | None:
        partition = families(grid, common)
        if partition not in made:
            made[partition] = own_group(partition)
        return made[partition]

    groups = Groups(
        grid,
        # ZeRO asks for a group of one rank, too.
        data_group=own(lambda place: place._replace(data_parallel_rank=0)),
        tensor_group=own(lambda place: place._replace(tensor_parallel_rank=0)) if is_divided else None,
        pipeline_group=own(lambda place: place._replace(stage=0)) if has_stages else None,
        replica_group=own(lambda place: place._replace(tensor_parallel_rank=0, stage=0)),
        ends_group=own(pipeline_of_ends) if has_stages else None,
    )
    if is_divided:
        feed_megatron(groups)
    return groups


def pipeline_of_ends(place: Grid) -> Grid | None:
    """What the two ends of a pipeline have in common; None for a stage between."""
    return place._replace(stage=0) if place.stage in (0, place.num_stages - 1) else None


def families(grid: Grid, common: Callable[[Grid], Grid | None]) -> Partition:
    """The ranks with the same `common`, for each value of it but None."""
    members: dict[Grid, list[int]] = {}
    for rank in range(grid.world_size):
        place = Grid.of(rank, grid.world_size, grid.tensor_parallel_size, grid.num_stages)
        if (family := common(place)) is not None:
            members.setdefault(family, []).append(rank)
    return tuple(map(tuple, members.values()))


def own_group(partition: Partition) -> ProcessGroup | None:
    """This rank's group of a partition, None if it is in no part. Every rank takes part.

    Once a device is bound to the ranks, torch makes a group by splitting NCCL's communicator of all ranks, those that
    are no members included: group by group that takes as many splits as there are groups, together one.
    """
    if dist.group.WORLD.bound_device_id is not None:
        return dist.split_group(split_ranks=[list(part) for part in partition], timeout=patience())
    made = [dist.new_group(list(part), timeout=patience()) for part in partition]
    own = [group for group, part in zip(made, partition, strict=True) if dist.get_rank() in part]
    return own[0] if own else None


def feed_megatron(groups: Groups) -> None:
    """Some of its functions (the loss over a divided vocabulary) know no group but its global one.

    Its own way to set that makes a thousand groups over 128 ranks. It is imported only here, since that costs seconds.
    """
    from megatron.core import parallel_state

    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = groups.tensor_group


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
