"""Our grid and groups as DeepSpeed's pipeline asks for them."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from deberta_xl.parallel.groups import Groups


class PipelineGrid(PipelineParallelGrid):
    """DeepSpeed's own makes a group for every part of its topology, those of one rank included, on every rank.

    It also looks through all ranks for each place, at every message between stages; here a place is computed.
    """

    def __init__(self, groups: Groups):
        """Sets what DeepSpeed's constructor does, without the topology and what is made of it."""
        grid = self.grid = groups.grid
        self.global_rank, self.world_size = grid.rank, grid.world_size
        self.data_parallel_size, self.pipe_parallel_size = grid.data_parallel_size, grid.num_stages
        self.model_parallel_size = self.slice_parallel_size = grid.tensor_parallel_size
        self.stage_id, self.data_parallel_id = grid.stage, grid.data_parallel_rank
        self.is_first_stage, self.is_last_stage = grid.stage == 0, grid.is_last_stage
        self.dp_proc_group, self.pp_proc_group = groups.data_group, groups.pipeline_group
        self.dp_group = dist.get_process_group_ranks(groups.data_group)
        self.pp_group = dist.get_process_group_ranks(groups.pipeline_group)
        self.ds_model_proc_group = groups.replica_group
        self.ds_model_world_size = grid.num_stages * grid.tensor_parallel_size
        self.ds_model_rank = grid.stage * grid.tensor_parallel_size + grid.tensor_parallel_rank

    def get_stage_id(self) -> int:
        """Which stage is here."""
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        """Which replica."""
        return self.data_parallel_id

    def get_slice_parallel_rank(self) -> int:
        """Which slice of its layers."""
        return self.grid.tensor_parallel_rank

    def stage_to_global(self, stage_id: int) -> int:
        """The rank with another stage of the same replica, and the same slice."""
        return self.grid._replace(stage=stage_id).rank
