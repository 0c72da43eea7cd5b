"""A start on thousands of ranks, invented in one process: the groups that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import masked_lm_parts
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.parallel.host_group import host_group, patience
from deberta_xl.parallel.pipeline import PipelinedModel, build_stage
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.stages import split_model
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.engine import build_engine

TINY = DebertaConfig(
    vocab_size=64, hidden_size=16, num_layers=4, num_heads=8, intermediate_size=16, max_position_embeddings=16,
    position_buckets=4,
)  # fmt: skip
LAYOUTS = ((1, 1), (2, 1), (8, 1), (1, 2), (1, 4), (2, 2), (8, 4))
"""Tensor-parallel size and stages."""


class Made(NamedTuple):
    """A group that a start made with this rank in it."""

    size: int
    backend: str | None
    timeout: timedelta | None


@contextmanager
def invented_world(rank: int, size: int) -> Iterator[list[Made]]:
    """One rank of a world whose others are not there: what it exchanges stays as it is. Gives the groups it joins."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    joined, make = [], distributed_c10d._new_group_with_tag

    def noted(ranks: list[int] | None, timeout: timedelta | None, backend: str | None, *rest: object, **more: object):
        if ranks is None or rank in ranks:
            joined.append(Made(size if ranks is None else len(ranks), backend, timeout))
        return make(ranks, timeout, None, *rest, **more)

    with mock.patch.object(distributed_c10d, "_new_group_with_tag", noted):
        yield joined
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def engine_of(groups: Groups) -> None:
    """All that DeepSpeed makes for a model of this grid."""
    grid = groups.grid
    if grid.num_stages > 1:
        split = split_model(masked_lm_parts(TINY), grid.num_stages, Load(2, 16, 4))
        model: nn.Module = build_stage(TINY, split.units(grid.stage), seed=0)
    else:
        model = MaskedLanguageModel(TINY)
    divide(model, groups)
    model = PipelinedModel(model, split, groups) if grid.num_stages > 1 else model
    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    build_engine(model, OptimizerSection(), settings, groups)


def groups_of_a_start(size: int, rank: int) -> list[tuple[Grid, list[Made], list[list[int]]]]:
    """For every layout: the grid, the groups that one rank joins, and the ranks of those that the house uses."""
    found = []
    for tensor, stages in LAYOUTS:
        with invented_world(rank, size) as joined:
            groups = build_groups(Grid.of(rank, size, tensor, stages))
            host_group()
            engine_of(groups)
            found.append((groups.grid, joined, [dist.get_process_group_ranks(group) for group in groups[1:] if group]))
    return found


@pytest.mark.parametrize(("size", "rank"), [(128, 127), (1024, 513), (4096, 1)])
def test_a_rank_joins_few_groups_and_none_that_nobody_uses(size, rank):
    (found,) = run_ranks(groups_of_a_start, 1, size, rank, backend=None)
    for grid, joined, used in found:
        axes = (grid.data_parallel_size > 1) + (grid.tensor_parallel_size > 1) + (grid.num_stages > 1)
        assert 1 + len(joined) <= 4 + 2 * axes, "with the world itself"
        # A gloo group of some ranks would put NCCL's splits of the world out of step.
        assert [made.size for made in joined if made.backend == "gloo"] == [size]
        made = sorted(made.size for made in joined if made.backend is None)
        assert made == sorted(map(len, set(map(tuple, used)))), "none but ours, each once"
        assert 1 not in made
        assert {made.timeout for made in joined} == {patience()}, "torch's own is shorter than the watchdog's"


def test_where_there_is_one_replica_only_zero_has_a_group_of_one_rank():
    for tensor, stages, sizes in ((2, 1, {1, 2}), (1, 2, {1, 2}), (2, 2, {1, 2, 4})):
        for groups in run_ranks(ranks_of_groups, tensor * stages, tensor, stages):
            assert {len(ranks) for ranks in groups.values()} == sizes
            assert [name for name, ranks in groups.items() if len(ranks) == 1] == ["data_group"]


def ranks_of_groups(tensor: int, stages: int) -> dict[str, list[int]]:
    """The ranks of each group that this rank has."""
    groups = build_groups(Grid.of(dist.get_rank(), dist.get_world_size(), tensor, stages))
    dist.barrier()  # where rank 0 ends, the others cannot make groups any more
    made = {name: group for name, group in groups._asdict().items() if name != "grid" and group is not None}
    return {name: dist.get_process_group_ranks(group) for name, group in made.items()}


def splits_of_a_start(size: int, tensor: int, stages: int) -> list[list[list[int]]]:
    """What a rank that is bound to a device splits the world into."""
    splits = []
    with invented_world(0, size) as joined:
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        with mock.patch.object(dist, "split_group", lambda split_ranks, timeout: splits.append(split_ranks)):
            build_groups(Grid.of(0, size, tensor, stages))
        dist.group.WORLD.bound_device_id = None
        assert not joined
    return splits


def test_every_rank_splits_nccls_world_once_for_each_of_its_groups():
    (splits,) = run_ranks(splits_of_a_start, 1, 1024, 8, 4, backend=None)
    data, tensor, pipeline, replica, ends = splits
    for split in (data, tensor, pipeline, replica):
        assert sorted(rank for part in split for rank in part) == list(range(1024))
    assert [len(split) for split in splits] == [32, 128, 256, 32, 256]
    assert all(len(part) == 2 and part[1] - part[0] == 768 for part in ends)
