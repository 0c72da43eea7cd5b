"""A task's micro-batches and their loss, with SiFT's beside it.

Batches are a pure function of the step: the same step has the same examples on any number of ranks.

Shape suffixes of this file:
    B rows   S sequence   I items (labelled tokens)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deberta_xl.data.loader import rank_samples
from deberta_xl.data.random_numbers import derive
from deberta_xl.data.sampler import permute, sample_rows
from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.task_losses import count_items, hide_padding, labelled_places, task_loss
from deberta_xl.model.task_model import Predict
from deberta_xl.objectives.sift import Sift
from deberta_xl.settings.architecture import HeadKind
from deberta_xl.settings.finetuning import FinetuneTrainSection
from deberta_xl.tasks.features import TaskBatch, TaskData

POOL_BATCHES = 64
"""Global batches among which lengths are sorted."""


class TaskMicroBatch(NamedTuple):
    """What one forward takes."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    token_types_BS: Tensor
    labels: Tensor
    num_options: int
    counts: tuple[int, int]
    """Items, which its part of the loss is a sum over, and tokens without padding."""
    place_I: Tensor | None = None
    """Where something is asked (`labelled_places`)."""

    @classmethod
    def of(cls, batch: TaskBatch, kind: HeadKind) -> TaskMicroBatch:
        """Host tensors of a batch."""
        ids_BS, segments_BS, types_BS, labels = map(torch.from_numpy, batch[:4])
        counts = count_items(kind, labels), int((segments_BS > 0).sum())
        return cls(ids_BS, segments_BS, types_BS, labels, batch.num_options, counts, labelled_places(kind, labels))


class TaskOrder:
    """Which features a step has: every one once an epoch, in an order drawn from (seed, epoch).

    With bucketing, the steps of a pool (never longer than an epoch) share out its features by length, and come in an
    order of their own.
    """

    def __init__(self, lengths: np.ndarray, global_batch_size: int, seed: int, *, bucketing: bool):
        self.lengths, self.batch_size, self.seed = lengths, global_batch_size, seed
        self.pool_batches = max(1, min(POOL_BATCHES, len(lengths) // global_batch_size)) if bucketing else 1
        self.pool = lru_cache(maxsize=2)(self.build_pool)

    def features(self, step: int) -> np.ndarray:
        """The features of update number `step`, 1 …; the longest last where lengths are sorted."""
        pool, place = divmod(step - 1, self.pool_batches)
        return self.pool(pool)[place]

    def build_pool(self, pool: int) -> np.ndarray:
        """The features of the steps of a pool, int64 [steps, global batch]."""
        count = self.pool_batches * self.batch_size
        _, rows = sample_rows(self.seed, len(self.lengths), pool * count, count)
        by_length = rows[np.argsort(self.lengths[rows], kind="stable")]
        batches = by_length.reshape(self.pool_batches, self.batch_size)
        keys = derive(self.seed, np.full(self.pool_batches, pool, np.int64))
        return batches[permute(np.arange(self.pool_batches), self.pool_batches, keys)]


def task_step_batches(
    data: TaskData, train: FinetuneTrainSection, first_step: int, *, rank: int, size: int
) -> Iterator[list[TaskMicroBatch]]:
    """For every step from `first_step` on: this data-parallel rank's micro-batches. Endless."""
    order = TaskOrder(data.lengths, train.global_batch_size, train.seed, bucketing=train.length_bucketing)
    step = first_step
    while True:
        features = order.features(step)
        starts = rank_samples(0, train.global_batch_size, train.micro_batch_size, rank, size)
        parts = (features[start : start + train.micro_batch_size] for start in starts)
        yield [TaskMicroBatch.of(data.batch(part), data.task.head) for part in parts]
        step += 1


class TaskLosses(NamedTuple):
    """Losses of a micro-batch, as shares of the global batch's mean."""

    total: Tensor
    """What is differentiated: task + weight · adversarial."""
    task: Tensor
    adversarial: Tensor
    """0 without SiFT."""


class TaskLoss:
    """The losses of one micro-batch. An engine's forward is given it (`TaskModel.forward`)."""

    def __init__(
        self,
        kind: HeadKind,
        hidden_size: int,
        batch: TaskMicroBatch,
        *,
        share: float,
        sift: Sift | None,
        sift_weight: float,
        class_weights: Tensor | None,
        key: DropoutKey | None,
    ):
        self.kind, self.hidden_size = kind, hidden_size
        self.batch, self.share = batch, share
        self.sift, self.sift_weight = sift, sift_weight
        self.class_weights, self.key = class_weights, key

    def __call__(self, predict: Predict) -> TaskLosses:
        """The losses, from as many passes as they take."""

        def logits(*, dropout_key: DropoutKey | None = None, perturb: object = None) -> Tensor:
            found = predict(dropout_key=dropout_key, perturb=perturb)
            return hide_padding(self.kind, found, self.batch.segments_BS > 0)

        labels = self.batch.labels
        clean = logits(dropout_key=self.key, perturb=self.sift.entry() if self.sift else None)
        task = task_loss(self.kind, clean, labels, self.class_weights) / self.share
        if self.sift is None:
            return TaskLosses(task, task.detach(), torch.zeros_like(task))
        key = fold_key(self.key, "sift")
        delta_BSD = self.sift.draw((*self.batch.input_ids_BS.shape, self.hidden_size), key, clean)
        adversarial = self.sift.term(logits, clean, self.batch.place_I, delta_BSD, key) / self.share
        total = task + self.sift_weight * adversarial
        return TaskLosses(total, task.detach(), adversarial.detach())
