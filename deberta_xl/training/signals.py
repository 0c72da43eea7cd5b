"""The one small agreement that all ranks make before each step: on the labels of the step, and on stopping."""

from __future__ import annotations

import torch
import torch.distributed as dist

from deberta_xl.log import logger
from deberta_xl.stop_request import StopRequest


class Agreement:
    """Sums and decisions over all ranks, on the host: a gloo group, so that no device has to be waited for."""

    def __init__(self) -> None:
        is_gloo = dist.get_backend() == "gloo"
        self.group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo")

    def before_step(self, num_labels: int, stop: StopRequest) -> tuple[int, bool]:
        """The sum of what every rank counts of the step's labelled positions, and whether any was asked to stop."""
        if stop.signal is not None:
            logger.warning("received %s: saving a checkpoint and stopping", stop.signal.name)
        votes = torch.tensor([num_labels, int(stop.signal is not None)], dtype=torch.int64)
        dist.all_reduce(votes, group=self.group)
        return int(votes[0]), bool(votes[1])
