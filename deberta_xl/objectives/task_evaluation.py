"""Logits of a task's held-out examples, over any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

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
    fetched: list[tuple[np.ndarray, Tensor]] = []
    numbers_of = length_batches(data.padded_lengths, micro_batch_tokens, rows_each=data.num_options)
    batches = feature_batches(data, numbers_of, rank=run.rank, size=run.size)
    for numbers, host_batch in run.batches(batches, does="predicting", count=math.ceil(len(numbers_of) / run.size)):
        batch = on_device(host_batch, run.device)
        logits = run.model(
            batch.input_ids_BS, batch.segments_BS, batch.token_types_BS, num_options=batch.num_options, perturb=entry
        )
        fetched.append((numbers, run.fetch(hide_padding(data.task.head, logits, batch.segments_BS > 0).float())))
    run.wait()
    found = dict(itertools.chain.from_iterable(by_feature(data, *of_batch) for of_batch in fetched))
    if run.size == 1:
        return found
    parts: list[dict[int, np.ndarray]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, found, group=host_group())
    return {number: logits for part in parts for number, logits in part.items()}


def by_feature(data: TaskData, numbers: np.ndarray, logits: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Number and logits of each feature of a batch, those of padding left out."""
    for number, of_feature in zip(numbers.tolist(), logits.numpy(), strict=True):
        length = len(data.features[number].rows[0].input_ids)
        # A copy: the padded ones of all batches need not live on.
        yield number, of_feature[:length].copy() if data.task.head in ("token", "span") else of_feature
