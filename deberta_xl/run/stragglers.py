"""Which node is slow. A step takes as long on every rank, since all wait for the slowest: the forward pass tells more.

Data-parallel ranks do not wait for each other there, and tensor-parallel ones, which do, share a node.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from statistics import fmean, median

import torch
import torch.distributed as dist

from deberta_xl.base.launch import node_name
from deberta_xl.base.log import rank_zero

SLOW = 1.15
"""A node that takes longer than this many times the median, twice in a row, is named in the log."""


class NodeTimes:
    """Compares the nodes' forward times; to be made, and asked, by all ranks together."""

    def __init__(self, group: dist.ProcessGroup):
        """`group` has all ranks, on the host."""
        self.group = group
        self.nodes: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self.nodes, node_name(), group=group)
        self.suspect: str | None = None

    def metrics(self, step: int, seconds: float) -> dict[str, float]:
        """The spread over nodes of this rank's `seconds` in `step`; nothing on a single node. Collective."""
        if len(set(self.nodes)) < 2:
            return {}
        every = torch.zeros(len(self.nodes), dtype=torch.float64)
        every[dist.get_rank()] = seconds
        dist.all_reduce(every, group=self.group)
        by_node: dict[str, list[float]] = defaultdict(list)
        for node, value in zip(self.nodes, every.tolist(), strict=True):
            by_node[node].append(value)
        means = {node: fmean(values) for node, values in by_node.items()}
        if not any(means.values()):  # a pipeline's forward passes are not timed apart
            return {}
        slowest, middle = max(means, key=means.__getitem__), median(means.values())
        slow = slowest if means[slowest] > SLOW * middle else None
        if slow and slow == self.suspect:
            rank_zero(
                "step %d: node %s is slow: its forward pass takes %.3f s, the median of %d nodes %.3f s",
                step, slowest, means[slowest], len(means), middle, level=logging.WARNING,
            )  # fmt: skip
        self.suspect = slow
        return {
            "slowest_node_seconds": means[slowest],
            "median_node_seconds": middle,
            "fastest_node_seconds": min(means.values()),
        }
