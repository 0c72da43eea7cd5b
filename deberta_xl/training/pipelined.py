"""A step, and predictions, on a DeepSpeed engine whose model is a stage of a pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.model.dropout import DropoutKey
from deberta_xl.objectives.evaluation import Judged, Sums
from deberta_xl.objectives.micro_batch import MicroBatch, on_device
from deberta_xl.objectives.objective import Staged
from deberta_xl.parallel.groups import Groups
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.timing import StepTimer
from deberta_xl.training.step import over_micro_batches

BATCHES_PER_STAGE = 4
"""Held-out batches that go through the pipeline at once, for each stage: a fifth of the time is idle at most."""


def run_pipeline_step(
    engine: deepspeed.PipelineEngine,
    objective: Staged,
    micro_batches: Sequence[MicroBatch],
    shares: Mapping[str, float],
    keys: Sequence[DropoutKey],
    *,
    heartbeat: Heartbeat,
    timer: StepTimer,
) -> Sums:
    """`run_step` for a stage of a pipeline: forwards, backwards and the update of one step, interleaved by DeepSpeed.

    All of it counts as the phase `forward_backward`. `micro_batches` are the replica's, whatever the stage. The figures
    are the last stage's; the others have zeros.
    """
    heartbeat.mark(heartbeat.step, "forward-backward")
    with timer.phase("forward_backward"):
        batches = [on_device(batch, engine.device) for batch in micro_batches]
        engine.module.feed(objective.stage_input(batch, shares, key) for batch, key in zip(batches, keys, strict=True))
        engine.train_batch(itertools.repeat(nothing_to_load(engine)))
        judged = zip(batches, engine.module.losses, engine.module.guesses, strict=engine.is_last_stage())
        found = [objective.stage_sums(batch, shares, loss, guesses) for batch, loss, guesses in judged]
    zeros = {name: torch.zeros((), device=engine.device) for name in objective.reports}
    sums = over_micro_batches(found, objective.reports) if found else {}
    return {**zeros, **sums, "loss": engine.dp_group_loss}


def nothing_to_load(engine: deepspeed.PipelineEngine) -> tuple[Tensor, Tensor]:
    """What DeepSpeed's pipeline is given as a batch: `PipelinedModel.feed` has brought the real one to every stage."""
    nothing = torch.zeros(1, dtype=torch.int64, device=engine.device)
    return nothing, nothing


def judge_in_pipeline(
    engine: deepspeed.PipelineEngine, objective: Staged, groups: Groups, host_batches: Iterable[MicroBatch]
) -> Iterator[Judged]:
    """What the model says of held-out micro-batches, in evaluation mode, on every stage. Collective.

    As many micro-batches as keep the stages busy go through the pipeline at once.
    """
    whole = dict.fromkeys(objective.counts, 1.0)
    engine.reset_activation_shape()  # DeepSpeed announces a shape once; the last one was training's
    host_batches = iter(host_batches)
    while chunk := list(itertools.islice(host_batches, BATCHES_PER_STAGE * engine.num_stages)):
        batches = [on_device(batch, engine.device) for batch in chunk]
        engine.module.feed(objective.stage_input(batch, whole, None) for batch in batches)
        losses = engine.eval_batch(
            itertools.repeat(nothing_to_load(engine)),
            compute_loss=False,
            reduce_output=None,
            num_micro_batches=len(chunk),
        )
        for number, (host_batch, batch) in enumerate(zip(chunk, batches, strict=True)):
            loss = losses[number] if engine.is_last_stage() else torch.zeros((), device=engine.device)
            guesses = engine.module.guesses[number] if engine.is_last_stage() else objective.stage_guesses(batch)
            for tensor in (loss, guesses):
                dist.broadcast(tensor, group=groups.pipeline_group, group_src=engine.num_stages - 1)
            yield Judged(host_batch, {"loss": loss, **objective.stage_sums(batch, whole, loss, guesses)}, guesses)
    engine.reset_activation_shape()
