"""Logits of a task's held-out examples, over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.data.progress import tracked
from deberta_xl.data.task_features import TaskData
from deberta_xl.model.task_losses import hide_padding
from deberta_xl.model.trunk import Perturb
from deberta_xl.objectives.masked_evaluation import batches_per_rank
from deberta_xl.objectives.task_batches import build_task_micro_batch


def feature_batches(data: TaskData, micro_batch_size: int, *, rank: int, size: int) -> Iterator[np.ndarray]:
    """This rank's features, similar lengths together.

    All ranks get equally many batches, since parameters partitioned over ranks need every rank in every forward: ranks
    that have run out repeat the shortest features.
    """
    order = np.argsort(data.lengths, kind="stable")
    for turn in range(rank, size * batches_per_rank(len(order), micro_batch_size, size), size):
        start = turn * micro_batch_size if turn * micro_batch_size < len(order) else 0
        yield order[start : start + micro_batch_size]


@torch.no_grad()
def task_logits(
    model: Callable[..., Tensor],
    data: TaskData,
    *,
    device: torch.device,
    micro_batch_size: int,
    entry: Perturb | None = None,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    guard: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]] = iter,
) -> dict[int, np.ndarray]:
    """The logits of every feature by number, on every rank. Collective over the `size` ranks of `group`.

    `model` is a module or an engine, in evaluation mode; `entry` what SiFT's original variant changes in clean passes;
    the batches go through `guard` on their way, which may end the evaluation.
    """
    found: dict[int, np.ndarray] = {}
    batches = guard(feature_batches(data, micro_batch_size, rank=rank, size=size))
    num_batches = batches_per_rank(len(data.lengths), micro_batch_size, size)
    for numbers in tracked(batches, "predicting", num_batches, "batches"):
        batch = build_task_micro_batch(data.batch(numbers), data.task.head, pin=False).to(device)
        logits = model(
            batch.input_ids_BS, batch.segments_BS, batch.token_types_BS, num_options=batch.num_options, perturb=entry
        )
        logits = hide_padding(data.task.head, logits, batch.segments_BS > 0).float().cpu().numpy()
        for number, of_feature in zip(numbers.tolist(), logits, strict=True):
            rows = data.features[number].rows
            per_token = data.task.head in ("token", "span")
            found[number] = of_feature[: len(rows[0].input_ids)] if per_token else of_feature
    if size == 1:
        return found
    parts: list[dict[int, np.ndarray]] = [{}] * size
    dist.all_gather_object(parts, found, group=group)
    return {number: logits for part in parts for number, logits in part.items()}
