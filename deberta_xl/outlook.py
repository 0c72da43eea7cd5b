"""What a run will take, said before its first step: operations and days, disk; and settings that look like a slip."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deberta_xl.checkpoint.manifest import step_folders
from deberta_xl.errors import ConfigError
from deberta_xl.log import rank_zero
from deberta_xl.model.flops import step_flops
from deberta_xl.model.parameter_shapes import parameter_shapes
from deberta_xl.parallel.memory import GIB, MASTER_AND_MOMENTS, estimate_memory

if TYPE_CHECKING:
    from deberta_xl.commands.pretraining import PretrainingInputs as Inputs

REFERENCE_FLOPS = 1e14
"""Operations per second and rank that days are told for: a round number to scale from, not a promise."""
MANY_EPOCHS = 100
"""Repeated text is worth less from about 4 passes on and nothing beyond some 40 (arXiv 2305.16264)."""
SPARE_ROWS = 1000
"""Rows of the word table beyond the tokenizer's pieces that pass as padding to a round number."""
FITTING = 0.9
"""Share of a device that the estimate may fill; libraries and fragmentation take the rest."""


def print_outlook(inputs: Inputs) -> None:
    """Work, disk, what fits the device, and warnings, on rank 0."""
    rank_zero("work: %s", describe_work(inputs))
    rank_zero("checkpoints: %s", describe_disk(inputs))
    if (gibibytes := device_gibibytes()) is not None:
        rank_zero("%s", describe_fit(inputs, gibibytes))
    for warning in warnings(inputs):
        rank_zero("%s", warning, level=logging.WARNING)


def describe_work(inputs: Inputs) -> str:
    """`1.2e+21 operations; if each of 8 ranks keeps up 100 TFLOP/s, 17.36 days = 3,333.3 rank hours`."""
    train, length = inputs.config.train, inputs.config.model.sequence_length
    labels = inputs.config.data.mask_probability * length * train.global_batch_size
    total = train.steps * step_flops(inputs.architecture, train.global_batch_size, length, labels)
    hours = total / REFERENCE_FLOPS / 3600
    ranks = inputs.launch.world_size
    return (
        f"{total:.2g} operations; if {f'each of {ranks} ranks' if ranks > 1 else 'the rank'} keeps up "
        f"{REFERENCE_FLOPS / 1e12:.0f} TFLOP/s, {hours / ranks / 24:,.2f} days = {hours:,.1f} rank hours"
    )


def checkpoint_bytes(inputs: Inputs) -> int:
    """Size of one checkpoint: float32 weight and Adam's two moments of every parameter."""
    return MASTER_AND_MOMENTS * sum(map(math.prod, parameter_shapes(inputs.architecture).values()))


def describe_disk(inputs: Inputs) -> str:
    """`18.81 GB each, at most 4 at a time: 75.26 GB, of 512 GB free`."""
    each, free = checkpoint_bytes(inputs), free_bytes(Path(inputs.config.run.folder))
    count = num_checkpoints(inputs)
    total = f"{count * each / 1e9:,.2f} GB, of {free / 1e9:,.0f} GB free"
    return f"{each / 1e9:,.2f} GB each, at most {count} at a time: {total}"


def num_checkpoints(inputs: Inputs) -> int:
    """How many there are at a time: those kept and the one being written, or all that the run makes."""
    made = math.ceil(inputs.config.train.steps / inputs.config.checkpoint.interval)
    keep = inputs.config.checkpoint.keep
    return min(keep + 1, made) if keep else made


def free_bytes(folder: Path) -> int:
    """Free disk where a folder is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def device_gibibytes() -> float | None:
    """GPU_MEMORY_GIB, None where it is unset or empty. Raises ConfigError."""
    text = os.environ.get("GPU_MEMORY_GIB")
    return read_gibibytes(text) if text else None


def read_gibibytes(text: str) -> float:
    """A device's memory. Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"GPU_MEMORY_GIB={text!r} is not a number of GiB, as in GPU_MEMORY_GIB=80")
    return value


def describe_fit(inputs: Inputs, gibibytes: float) -> str:
    """Which micro-batches fit a device of so many GiB, with and without recomputation."""
    found = []
    for recomputes in (False, True):
        largest = largest_micro_batch(inputs, gibibytes, recomputes)
        setting = f"train.activation_checkpointing={str(recomputes).lower()}"
        found.append(f"{largest} with {setting}" if largest else f"none with {setting}")
    return f"largest train.micro_batch_size that fits GPU_MEMORY_GIB={gibibytes:g}: {', '.join(found)}"


def largest_micro_batch(inputs: Inputs, gibibytes: float, recomputes: bool) -> int | None:
    """The largest that divides the batch and is estimated to fit every stage; None when not even 1 does."""
    config, grid = inputs.config, inputs.grid
    per_replica = config.train.global_batch_size // grid.data_parallel_size
    small = [n for n in range(1, math.isqrt(per_replica) + 1) if per_replica % n == 0]
    for size in sorted({*small, *(per_replica // n for n in small)}, reverse=True):
        train = replace(config.train, micro_batch_size=size, activation_checkpointing=recomputes)
        trial = replace(config, train=train)
        stages = (grid._replace(stage=stage) for stage in range(grid.num_stages))
        needed = (estimate_memory(inputs.architecture, trial, inputs.engine, s, inputs.split).total for s in stages)
        if max(needed) <= FITTING * gibibytes * GIB:
            return size
    return None


def warnings(inputs: Inputs) -> Iterator[str]:
    """Settings that nobody means, or that end in trouble days later."""
    train, architecture, rows = inputs.config.train, inputs.architecture, inputs.data.num_rows
    epochs = train.steps * train.global_batch_size / rows
    if epochs > MANY_EPOCHS:
        yield (
            f"the run reads its {rows:,} rows {epochs:,.0f} times: more text, or "
            f"train.steps={max(1, round(MANY_EPOCHS * rows / train.global_batch_size))} for {MANY_EPOCHS} times"
        )
    spare = architecture.vocab_size - inputs.tokenizer.vocab_size
    if spare > max(SPARE_ROWS, inputs.tokenizer.vocab_size // 10):
        yield (
            f"model.vocab_size={architecture.vocab_size}, but the tokenizer has {inputs.tokenizer.vocab_size} pieces: "
            f"{spare:,} rows of the word table ({spare * architecture.embedding_width:,} parameters) will never be "
            "trained; leave model.vocab_size out to take the tokenizer's size"
        )
    needed, free = checkpoint_bytes(inputs) * num_checkpoints(inputs), free_bytes(Path(inputs.config.run.folder))
    if needed > free and not step_folders(Path(inputs.config.run.folder) / "checkpoints"):
        yield (
            f"{needed / 1e9:,.1f} GB of checkpoints do not fit the {free / 1e9:,.1f} GB that are free for "
            f"{inputs.config.run.folder}: a smaller checkpoint.keep, another run.folder, or make room"
        )
