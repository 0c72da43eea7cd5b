"""A step, and predictions, on a DeepSpeed engine whose model is a stage of a pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.model.dropout import DropoutKey
from deberta_xl.objectives.masked_batches import MicroBatch
from deberta_xl.objectives.masked_evaluation import Prediction
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.pipeline import StageInput
from deberta_xl.training.engine import StepResult, scaler_in_words
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.timing import StepTimer

BATCHES_PER_STAGE = 4
"""Held-out batches that go through the pipeline at once, for each stage: a fifth of the time is idle at most."""


@scaler_in_words()
def run_pipeline_step(
    engine: deepspeed.PipelineEngine,
    micro_batches: Sequence[MicroBatch],
    *,
    num_labels: int,
    data_parallel_size: int,
    keys: Sequence[DropoutKey],
    heartbeat: Heartbeat,
    timer: StepTimer,
) -> StepResult:
    """`run_step` for a stage of a pipeline: forwards, backwards and the update of one step, interleaved by DeepSpeed.

    All of it counts as the phase `forward_backward`. `micro_batches` are the replica's, whatever the stage.
    """
    share = max(1, num_labels) / (len(micro_batches) * data_parallel_size)
    heartbeat.mark(heartbeat.step, "forward-backward")
    with timer.phase("forward_backward"):
        batches = [batch.to(engine.device) for batch in micro_batches]
        engine.module.feed(StageInput(*batch, share, k) for batch, k in zip(batches, keys, strict=True))
        engine.train_batch(itertools.repeat(nothing_to_load(engine)))
        corrects = [
            (guess_L == batch.labelled.label_L).sum()
            for guess_L, batch in zip(engine.module.guesses, batches, strict=engine.is_last_stage())
        ]
    num_correct = torch.stack(corrects).sum() if corrects else torch.zeros((), device=engine.device)
    return StepResult(engine.dp_group_loss, num_correct)


def nothing_to_load(engine: deepspeed.PipelineEngine) -> tuple[Tensor, Tensor]:
    """What DeepSpeed's pipeline is given as a batch: `PipelinedModel.feed` has brought the real one to every stage."""
    nothing = torch.zeros(1, dtype=torch.int64, device=engine.device)
    return nothing, nothing


def predict_in_pipeline(
    engine: deepspeed.PipelineEngine, batches: Iterable[MicroBatch], groups: Groups
) -> Iterator[Prediction]:
    """Predictions for held-out batches, in evaluation mode, on every stage. Collective.

    As many batches as keep the stages busy go through the pipeline at once.
    """
    engine.reset_activation_shape()  # DeepSpeed announces a shape once; the last one was training's
    batches = iter(batches)
    while chunk := [
        batch.to(engine.device) for batch in itertools.islice(batches, BATCHES_PER_STAGE * engine.num_stages)
    ]:
        engine.module.feed(StageInput(*batch, 1.0) for batch in chunk)
        losses = engine.eval_batch(
            itertools.repeat(nothing_to_load(engine)),
            compute_loss=False,
            reduce_output=None,
            num_micro_batches=len(chunk),
        )
        for number, batch in enumerate(chunk):
            label_L = batch.labelled.label_L
            loss = losses[number] if engine.is_last_stage() else torch.zeros((), device=engine.device)
            guess_L = engine.module.guesses[number] if engine.is_last_stage() else torch.zeros_like(label_L)
            for tensor in (loss, guess_L):
                dist.broadcast(tensor, group=groups.pipeline_group, group_src=engine.num_stages - 1)
            yield Prediction(label_L, loss, guess_L)
    engine.reset_activation_shape()
