"""The loss of a fine-tuning run's micro-batch: the task's, and SiFT's beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.task_losses import hide_padding, task_loss
from deberta_xl.model.task_model import Predict
from deberta_xl.objectives.sift import Sift
from deberta_xl.objectives.task_batches import TaskMicroBatch
from deberta_xl.settings.architecture import HeadKind


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
        adversarial = self.sift.term(logits, clean, labels, delta_BSD, key) / self.share
        total = task + self.sift_weight * adversarial
        return TaskLosses(total, task.detach(), adversarial.detach())
