"""What a step on the engine asks of the device, and leaves to Python's collector, with every shipped configuration."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from host_reads import HostReads
from layouts import Case, Layout, Run, architecture
from ranks import run_ranks
from small_dataset import SmallDataset

from deberta_xl.run.timing import StepTimer
from deberta_xl.settings.deepspeed_config import SHIPPED_CONFIGS
from deberta_xl.training.loop import Training

FIRST = ["zero1_bf16", "zero2_bf16", "zero3_bf16"]
OTHERS = sorted({path.stem for path in SHIPPED_CONFIGS.glob("*.json")} - {*FIRST})
STEPS = 3
PER_UPDATE = 2
"""Reads: whether the gradient is finite, and its norm, by which it is clipped."""
OFFLOADED = 4
"""Where gradients are on the host, DeepSpeed brings the norm of each group of parameters there and back."""


class Seen(NamedTuple):
    """Of the last step of a run; ZeRO-3 learns in the ones before it what it will be asked for."""

    forward_and_backward: list[str]
    """Reads."""
    update: list[str]
    """Reads."""
    garbage: list[str]
    """Tensors that all steps have left in cycles."""


@contextmanager
def watched() -> Iterator[Seen]:
    """What the steps made inside ask and leave."""
    seen, reads = Seen([], [], []), HostReads()
    phase, update = StepTimer.phase, Training.update

    @contextmanager
    def noted(timer: StepTimer, name: str) -> Iterator[None]:
        before = len(reads.found)
        with phase(timer, name):
            yield
        if name == "forward_backward":
            seen.forward_and_backward.extend(reads.found[before:])
            del reads.found[before:]

    def whole(training: Training, *given: Any, **named: Any) -> Any:
        seen.forward_and_backward.clear()
        with reads:
            sums = update(training, *given, **named)
        seen.update[:] = reads.found
        reads.found.clear()
        return sums

    with mock.patch.object(StepTimer, "phase", noted), mock.patch.object(Training, "update", whole):
        yield seen


def tensors_in_cycles() -> list[str]:
    """What only Python's collector would free."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = [f"{tuple(thing.shape)} {thing.dtype}" for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    gc.garbage.clear()
    return found


def step_on(dataset: SmallDataset, folder: Path, names: list[str]) -> dict[str, Seen]:
    """Three steps of two micro-batches with each configuration."""
    found = {}
    for name in names:
        case = Case(accumulation=2, dropout=0.1, shipped=name)
        config = architecture(vocab_size=dataset.tokenizer.vocab_size)
        # The CPU's own kernel looks where documents begin, and masks of pairs are looked at there; not on a GPU.
        words = ["model.kernel=reference", "model.attention_dropout=0"]
        run = Run(dataset, folder / name, Layout(), case, config, STEPS, words)
        with watched() as seen:
            run.train(lambda seen=seen: seen.garbage.extend(tensors_in_cycles()))
        found[name] = seen
    return found


@pytest.mark.parametrize("names", [FIRST, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["bf16", "others"])
def test_a_step_asks_the_device_twice_at_most_and_leaves_no_tensor_to_the_collector(small_dataset, tmp_path, names):
    (found,) = run_ranks(step_on, 1, small_dataset, tmp_path, names, backend=None, timeout=300)
    for name, seen in found.items():
        assert seen.forward_and_backward == [], name
        assert seen.garbage == [], name
        assert 0 < len(seen.update) <= (OFFLOADED if "offload" in name else PER_UPDATE), (name, seen.update)
