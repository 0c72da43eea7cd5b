"""One update of a fine-tuning run: the task's loss, SiFT's beside it, over all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import deepspeed
import torch
from torch import Tensor

from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.task_losses import hide_padding, task_loss
from deberta_xl.model.task_model import Predict, TaskModel
from deberta_xl.objectives.sift import Sift
from deberta_xl.objectives.task_batches import TaskMicroBatch
from deberta_xl.training.engine import scaler_in_words
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.timing import StepTimer


class TaskLosses(NamedTuple):
    """Losses of a micro-batch, or one rank's part of a step, as shares of the global batch's mean."""

    total: Tensor
    """What is differentiated: task + weight · adversarial."""
    task: Tensor
    adversarial: Tensor
    """0 without SiFT."""


class TaskObjective:
    """The loss of one micro-batch. An engine's forward is given it (`TaskModel.forward`)."""

    def __init__(
        self,
        model: TaskModel,
        batch: TaskMicroBatch,
        *,
        share: float,
        sift: Sift | None,
        sift_weight: float,
        class_weights: Tensor | None,
        key: DropoutKey | None,
    ):
        self.kind, self.hidden_size = model.head.kind, model.config.hidden_size
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


@scaler_in_words()
def run_task_step(
    engine: deepspeed.DeepSpeedEngine,
    micro_batches: Sequence[TaskMicroBatch],
    *,
    num_items: int,
    data_parallel_size: int,
    sift: Sift | None,
    sift_weight: float,
    class_weights: Tensor | None,
    keys: Sequence[DropoutKey],
    heartbeat: Heartbeat,
    timer: StepTimer,
) -> TaskLosses:
    """Forward and backward of every micro-batch, then one update; this rank's mean losses, still on the device.

    The loss is the mean over the `num_items` items of the global batch, as in pretraining's `run_step`.
    """
    share = max(1, num_items) / (len(micro_batches) * data_parallel_size)
    losses = []
    for host_batch, key in zip(micro_batches, keys, strict=True):
        heartbeat.mark(heartbeat.step, "forward-backward")
        batch = host_batch.to(engine.device)
        objective = TaskObjective(
            engine.module,
            batch,
            share=share,
            sift=sift,
            sift_weight=sift_weight,
            class_weights=class_weights,
            key=key,
        )
        with timer.phase("forward_backward"):
            found = engine(
                batch.input_ids_BS,
                batch.segments_BS,
                batch.token_types_BS,
                num_options=batch.num_options,
                objective=objective,
            )
            engine.backward(found.total)
        losses.append(torch.stack([loss.detach() for loss in found]))
        del found
        heartbeat.mark(heartbeat.step, "optimizer")
        with timer.phase("optimizer"):
            engine.step()
    return TaskLosses(*torch.stack(losses).mean(0))
