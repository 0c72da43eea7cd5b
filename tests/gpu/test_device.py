"""The model on a GPU, without an engine: nothing waits for the device, and places give what they give on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from gpu_runs import pretraining
from torch import nn

from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.kernels.contract import Where
from deberta_xl.kernels.dropout import DropoutRule, keep_mask, keep_pairs
from deberta_xl.kernels.registry import KERNELS, Demand
from deberta_xl.kernels.relative_index import Buckets, offset_rows
from deberta_xl.kernels.sampling import draw_tokens
from deberta_xl.model.trunk import Trunk
from deberta_xl.objectives.evaluation import Sums
from deberta_xl.objectives.micro_batch import on_device, pinned
from deberta_xl.objectives.objective import Objective
from deberta_xl.parallel.grid import Grid
from deberta_xl.settings.platform import Platform
from deberta_xl.training.step import even_shares, micro_batch_keys, over_micro_batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WAITING = {"strided": "looks at where documents begin"}
"""Kernels that wait for a GPU, and what for."""
SMALL = ("model.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=4")
PRESETS = {"replaced_tokens": "v3_debug"}


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """RuntimeError at the first call that waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pass_through(
    objective: Objective,
    model: nn.Module,
    batches: Sequence[Any],
    grid: Grid,
    watch: Callable[[], AbstractContextManager],
) -> Sums:
    """Forward and backward of a step's micro-batches, each in a context of `watch`."""
    columns = zip(*(batch.counts for batch in batches), strict=True)
    counts = dict(zip(objective.counts, map(sum, columns), strict=True))

    def update(
        losses: Any, micro_batches: Sequence[Any], shares: Mapping[str, float], keys: Sequence[Any], *,
        learner: str | None = None, reports: Any = None,
    ) -> Sums:  # fmt: skip
        found = []
        for host_batch, key in zip(micro_batches, keys, strict=True):
            batch = on_device(host_batch, GPU)
            with watch():
                sums = losses(model, batch, shares, key)
                sums["loss"].backward()
            found.append({name: value.detach() for name, value in sums.items()})
        return over_micro_batches(found, objective.reports if reports is None else reports)

    keys = micro_batch_keys(1, 1, len(batches), grid)
    return objective.step(update, batches, even_shares(counts, len(batches), 1), keys)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in WAITING])
@pytest.mark.parametrize("objective", ["masked_lm", "replaced_tokens", "causal", "mixed"])
def test_nothing_waits_for_the_device_in_forward_and_backward(small_dataset, tmp_path, objective, kernel):
    with pytest.raises(RuntimeError), nothing_waits():
        torch.ones(1, device=GPU).item()  # it would be seen
    preset = PRESETS.get(objective, "debug")
    words = pretraining(
        tmp_path, small_dataset[:2], "zero1_bf16", *SMALL, f"train.objective={objective}", preset=preset
    )
    inputs = read_inputs(parse_arguments(words))
    if reason := KERNELS[kernel].refusal(Demand(inputs.architecture, inputs.mask, Platform("cuda", 2))):
        pytest.skip(reason)
    learnt = inputs.objective()
    model = learnt.build().to(GPU, torch.bfloat16).train()
    for trunk in (module for module in model.modules() if isinstance(module, Trunk)):
        trunk.use_kernel(kernel, inputs.mask)
    steps = learnt.batches(1, 0, rank=0, size=1)
    for watch in (contextlib.nullcontext, nothing_waits):  # what is made once is made in the first step
        sums = pass_through(learnt, model, [pinned(batch) for batch in next(steps)], inputs.grid, watch)
    assert torch.isfinite(sums["loss"])
    print(f"{objective}, {kernel}: loss {sums['loss'].item():.4f}, no wait")


@pytest.mark.parametrize("rule", ["original", "transformers"])
def test_distances_fall_into_the_buckets_of_the_cpu(rule):
    for buckets, reach in ((256, 512), (32, 512), (8, 48), (256, 8192), (0, 512)):
        known = Buckets(buckets, reach, rule)
        for length in (48, 512, 4096):
            assert torch.equal(offset_rows(length, known, GPU).cpu(), offset_rows(length, known, CPU)), (known, length)


def test_dropout_drops_what_it_drops_on_the_cpu():
    rule = DropoutRule(0.1, 2**62 + 12345, 3)
    row = torch.arange(1000)
    assert torch.equal(keep_mask(row.to(GPU), 77, rule).cpu(), keep_mask(row, 77, rule))
    segments = torch.tensor([[1] * 20 + [2] * 31 + [3] * 9 + [0] * 4, [1] * 64, [1] * 3 + [2] * 61])
    kept = [keep_pairs(Where(segments.to(device), Buckets(8, 48)).places, 5, 64, rule).cpu() for device in (CPU, GPU)]
    assert torch.equal(*kept)
    assert 0.88 < kept[0].float().mean() < 0.92


def test_tokens_are_drawn_as_on_the_cpu():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 1001, generator=generator)
    position, seed = torch.arange(400), torch.randint(2**62, (400,), generator=generator)
    drawn = [draw_tokens(*(x.to(device) for x in (logits, position, seed))).token_L.cpu() for device in (CPU, GPU)]
    differing = int((drawn[0] != drawn[1]).sum())
    print(f"{differing} of 400 draws differ from the CPU's")
    assert differing <= 1  # where two logits with their noise are within rounding
