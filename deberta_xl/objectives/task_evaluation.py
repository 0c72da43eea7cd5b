"""Logits of a task's held-out examples, over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from deberta_xl.model.task_losses import hide_padding
from deberta_xl.model.trunk import Perturb
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.micro_batch import on_device
from deberta_xl.objectives.task_batches import TaskMicroBatch
from deberta_xl.parallel.host_group import host_group
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.length_batches import length_batches


class NumberedBatch(NamedTuple):
    """Features and their numbers."""

    numbers: np.ndarray
    batch: TaskMicroBatch


def feature_batches(data: TaskData, batches: Sequence[np.ndarray], *, rank: int, size: int) -> Iterator[NumberedBatch]:
    """This rank's features, of the numbers in all batches.

    All ranks get equally many batches, since parameters partitioned over ranks need every rank in every forward: ranks
    that have run out repeat the last one, of the shortest features.
    """
    for turn in range(rank, size * math.ceil(len(batches) / size), size):
        numbers = batches[min(turn, len(batches) - 1)]
        yield NumberedBatch(numbers, TaskMicroBatch.of(data.batch(numbers), data.task.head))


@torch.no_grad()
def task_logits(
    run: Evaluator, data: TaskData, *, micro_batch_tokens: int, entry: Perturb | None = None
) -> dict[int, np.ndarray]:
    """The logits of every feature by number, on every rank. Collective.

    `micro_batch_tokens` is the most that one forward takes, but for a feature that has more alone. `entry` is what
    SiFT's original variant changes in clean passes.
    """
    found: dict[int, np.ndarray] = {}
    numbers_of = length_batches(data.padded_lengths, micro_batch_tokens, rows_each=data.num_options)
    batches = feature_batches(data, numbers_of, rank=run.rank, size=run.size)
    for numbers, host_batch in run.batches(batches, does="predicting", count=math.ceil(len(numbers_of) / run.size)):
        batch = on_device(host_batch, run.device)
        logits = run.model(
            batch.input_ids_BS, batch.segments_BS, batch.token_types_BS, num_options=batch.num_options, perturb=entry
        )
        logits = hide_padding(data.task.head, logits, batch.segments_BS > 0).float().cpu().numpy()
        for number, of_feature in zip(numbers.tolist(), logits, strict=True):
            rows = data.features[number].rows
            per_token = data.task.head in ("token", "span")
            found[number] = of_feature[: len(rows[0].input_ids)] if per_token else of_feature
    if run.size == 1:
        return found
    parts: list[dict[int, np.ndarray]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, found, group=host_group())
    return {number: logits for part in parts for number, logits in part.items()}
