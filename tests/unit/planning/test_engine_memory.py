"""The estimate of what an engine takes, against engines of every kind."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks

from benchmarks.interleaved import peak_bytes
from deberta_xl.planning.engine_memory import Held, engine_memory
from deberta_xl.settings.deepspeed_config import SHIPPED_CONFIGS, DeepSpeedConfig, load_deepspeed_config
from deberta_xl.settings.presets import load_run_config
from deberta_xl.settings.pretraining import RunConfig
from deberta_xl.training.engine import build_engine

BUCKET = 100_000
"""Elements of every bucket and bound: a fifth of the model."""


class Model(torch.nn.Module):
    """A table that is larger than others, and layers; with next to no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(480, 128) / 50)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(128, 128) for _ in range(24))

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Something to make small."""
        hidden = row
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return (hidden @ self.table[:8].T).float().square().mean()


class Measured(NamedTuple):
    """Bytes of an engine."""

    held: Held
    fullest: int
    """In a step's last forward and backward pass and in its update."""


def run_config() -> RunConfig:
    """Two micro-batches of one row."""
    return load_run_config("debug", ["train.global_batch_size=2", "train.micro_batch_size=1"])


def live_bytes() -> int:
    """Of all tensors there are."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(settings: dict[str, Any]) -> Measured:
    """An engine's third step."""
    before, run = live_bytes(), run_config()
    engine = build_engine(Model(), run.optimizer, settings)
    for group in engine.optimizer.optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    row = torch.randn(1, 128).to(next(engine.module.parameters()).dtype)

    def run_pass() -> None:
        engine.backward(engine(row))

    for _ in range(5):
        run_pass()
        engine.step()
    resting = live_bytes() - before
    fullest = resting + peak_bytes(run_pass, torch.device("cpu"))
    waiting = live_bytes() - before
    fullest = max(fullest, waiting + peak_bytes(engine.step, torch.device("cpu")))
    numels = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()]
    return Measured(Held(sum(numels), max(numels), 1), fullest)


def changed(name: str, folder: Path, sections: dict[str, Any]) -> DeepSpeedConfig:
    """A shipped file with small buckets, and other sections where they are given."""
    tree = json.loads((SHIPPED_CONFIGS / f"{name}.json").read_text())
    zero = tree["zero_optimization"]
    sizes = {key for key in zero if key.endswith(("_size", "_parameters", "_distance"))} | {"reduce_bucket_size"}
    zero |= dict.fromkeys(sizes, BUCKET)
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    tree |= sections
    path = folder / f"{name}.json"
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return load_deepspeed_config(path, run_config())


CASES = {
    "zero1_bf16": ("zero1_bf16", {}),
    "ZeRO-1, summed over ranks in bfloat16": ("zero1_bf16", {"communication_data_type": "bf16"}),
    "ZeRO-1, all sums in bfloat16": ("zero1_bf16", {"data_types": None}),
    "cpu_debug": ("cpu_debug", {}),
    "zero2_bf16": ("zero2_bf16", {}),
    "fp16": ("fp16", {"fp16": {"enabled": True, "initial_scale_power": 0}}),
    "zero3_bf16": ("zero3_bf16", {}),
    "zero3_fp32": ("zero3_fp32", {}),
}


def measure_all(settings: dict[str, dict[str, Any]]) -> dict[str, Measured]:
    """`measure` of each."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    return {name: measure(of_one) for name, of_one in settings.items()}


OFTEN = ("zero1_bf16", "zero2_bf16")
"""The first choices on GPUs."""


@pytest.mark.parametrize(
    "names", [OFTEN, pytest.param(tuple(name for name in CASES if name not in OFTEN), marks=pytest.mark.full)], ids=len
)
def test_an_engine_takes_what_is_estimated_at_its_fullest(names, tmp_path):
    engines = {name: changed(CASES[name][0], tmp_path, CASES[name][1]) for name in names}
    run = run_config()
    (found,) = run_ranks(measure_all, 1, {name: engine.engine_dict(1, run) for name, engine in engines.items()})
    ratios = {}
    for name, measured in found.items():
        taken = engine_memory(engines[name], measured.held)
        estimated = taken.weights + taken.gradients + taken.optimizer + max(taken.buffers, taken.update)
        ratios[name] = estimated / measured.fullest
    assert ratios == pytest.approx(dict.fromkeys(names, 1.0), rel=0.05)
