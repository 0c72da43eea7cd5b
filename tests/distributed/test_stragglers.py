"""The report on slow nodes, on ranks that say they are on several."""

from __future__ import annotations

import os

import pytest
import torch
from ranks import run_ranks

from deberta_xl.run import stragglers
from deberta_xl.run.stragglers import NodeTimes


def report(ranks_per_node: int, seconds: list[float]) -> tuple[dict[str, float], list[str]]:
    """Metrics of one rank, and what rank 0 logs."""
    rank, said = torch.distributed.get_rank(), []
    os.environ["SLURMD_NODENAME"] = f"n{rank // ranks_per_node + 1}"
    stragglers.rank_zero = lambda text, *values, level: said.append(text % values)
    times = NodeTimes(torch.distributed.group.WORLD)
    times.metrics(4, seconds[rank])
    assert not said  # once is chance
    return times.metrics(5, seconds[rank]), said


def test_the_slow_node_is_named_with_its_time_and_the_others():
    for metrics, said in run_ranks(report, 3, 1, [1.0, 2.0, 1.1]):
        assert metrics == {
            "slowest_node_seconds": 2.0, "median_node_seconds": pytest.approx(1.1), "fastest_node_seconds": 1.0,
        }  # fmt: skip
        assert said == ["step 5: node n2 is slow: its forward pass takes 2.000 s, the median of 3 nodes 1.100 s"]


def test_alike_nodes_and_a_single_node_are_no_news():
    assert [said for _, said in run_ranks(report, 2, 1, [1.0, 1.05])] == [[], []]
    assert run_ranks(report, 2, 2, [1.0, 9.0]) == [({}, []), ({}, [])]


def test_times_that_were_not_measured_are_not_reported():
    assert run_ranks(report, 2, 1, [0.0, 0.0]) == [({}, []), ({}, [])]
