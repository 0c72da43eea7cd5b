"""One optimizer update on a DeepSpeed engine: forward and backward of every micro-batch of this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import deepspeed
import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.objectives.evaluation import Sums
from deberta_xl.objectives.micro_batch import MicroBatch, on_device
from deberta_xl.objectives.objective import Losses, Mean, Reports
from deberta_xl.parallel.grid import Grid
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.timing import StepTimer


def micro_batch_keys(seed: int, step: int, count: int, grid: Grid) -> list[DropoutKey]:
    """Dropout keys of this rank's `count` micro-batches of a step.

    A key names the micro-batch's place in the global batch (`rank_samples`), so a run of equal micro-batches has the
    same masks on any number of data-parallel ranks.
    """
    key = DropoutKey(seed).fold("step", step)
    size, rank = grid.data_parallel_size, grid.data_parallel_rank
    return [key.fold("micro-batch", number * size + rank) for number in range(count)]


def even_shares(counts: Mapping[str, int], num_micro_batches: int, data_parallel_size: int) -> dict[str, float]:
    """What one micro-batch would count if the global batch's `counts` were spread evenly.

    DeepSpeed divides by the number of micro-batches and averages over ranks: where each micro-batch divides its sum by
    this, what comes out is the mean over the global batch.
    """
    return {name: max(1, count) / (num_micro_batches * data_parallel_size) for name, count in counts.items()}


def check_figures(found: Sums, reports: Reports) -> None:
    """Refuse a micro-batch's figures where one of `reports` is missing or is no single number.

    Raises ConfigError: the objective may be a user's.
    """
    if missing := [name for name in reports if name not in found]:
        raise ConfigError(
            f"the objective's losses give no {', '.join(missing)}, which its reports have: give it, or leave it out "
            "there (docs/pretraining.md)"
        )
    for name, value in found.items():
        if not (isinstance(value, Tensor) and value.dim() == 0):
            what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a Python {type(value).__name__}"
            raise ConfigError(
                f"the objective's losses give {what} as {name}, where one number on the device is needed: the sum over "
                "the micro-batch (docs/pretraining.md)"
            )


def over_micro_batches(found: Sequence[Sums], reports: Reports) -> Sums:
    """This rank's figures of a step: the mean of losses, the sum of what is counted.

    Raises ConfigError where an objective gives a figure that it does not report, which may be a user's.
    """
    if unknown := [name for name in found[0] if name not in reports]:
        raise ConfigError(
            f"the objective's losses give {', '.join(unknown)}, but its reports have only {', '.join(reports)}: "
            "say there what each is divided by (docs/pretraining.md)"
        )
    columns = {name: torch.stack([of_batch[name] for of_batch in found]) for name in found[0]}
    return {
        name: column.mean() if isinstance(reports[name], Mean) else column.sum() for name, column in columns.items()
    }


def run_step(
    engine: deepspeed.DeepSpeedEngine,
    losses: Losses,
    micro_batches: Sequence[MicroBatch],
    shares: Mapping[str, float],
    keys: Sequence[DropoutKey],
    *,
    reports: Reports,
    heartbeat: Heartbeat,
    timer: StepTimer,
) -> Sums:
    """Forward and backward of every micro-batch, then one optimizer update; its figures, still on the device.

    `keys` has a dropout key for each micro-batch, which all have the same `shares`.
    """
    found = []
    for host_batch, key in zip(micro_batches, keys, strict=True):
        heartbeat.mark(heartbeat.step, "forward-backward")
        batch = on_device(host_batch, engine.device)
        with timer.phase("forward_backward"):
            with timer.phase("forward"):
                of_batch = losses(engine, batch, shares, key)
                check_figures(of_batch, reports)
            engine.backward(of_batch["loss"])
        found.append({name: value.detach() for name, value in of_batch.items()})
        del of_batch  # what its graph holds would live through the next forward
        heartbeat.mark(heartbeat.step, "optimizer")
        with timer.phase("optimizer"):
            engine.step()
    return over_micro_batches(found, reports)
