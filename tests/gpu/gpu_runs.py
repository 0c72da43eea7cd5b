"""Commands as a user types them, on the GPU or on the CPU beside it, several at a time: starting takes longest."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from deberta_xl.weights.native import find_weights_folder, read_weights

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "deberta_xl" / "pretrain.py"
FINETUNE = ROOT / "deberta_xl" / "finetune.py"
SECONDS = 300
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
STOPPING = (
    "import sys; from pathlib import Path; from started import live; "
    "live(Path(sys.argv[1]), sys.argv[3:], None, Path('/dev/stdout'), int(sys.argv[2]))"
)
"""Receives a signal after a step (`tests/started.py`)."""
UNSTEADY = ("seconds", "per_second", "utilization", "memory_gib")
"""How figures end that may differ between equal runs."""


class Command(NamedTuple):
    """What follows `python`, and on what it runs."""

    words: list[str]
    is_on_gpu: bool = True

    def environment(self) -> dict[str, str]:
        """The test's, without what a launcher would set; on the CPU, with no GPU to be seen."""
        kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH"))))
        # NCCL says its version when it joins the ranks. What `tests/ranks.py` would choose is the CPU.
        on_gpu = {"NCCL_DEBUG": "VERSION", "DS_ACCELERATOR": "cuda"}
        chosen = on_gpu if self.is_on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **chosen}

    def begin(self) -> subprocess.Popen[str]:
        """Start."""
        return subprocess.Popen(
            [sys.executable, *self.words],
            env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def run(*commands: Command) -> list[str]:
    """All of them at a time, to their ends, which must be good; what each said."""
    processes = [command.begin() for command in commands]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return said


def pretraining(folder: Path, dataset: tuple[Path, Path], engine: str, *overrides: str, preset: str) -> list[str]:
    """Arguments of pretraining in `folder`, on the prefixes of a training and a held-out dataset."""
    train, valid = dataset
    return [
        "--config", preset, "--deepspeed_config", str(ROOT / "deepspeed_configs" / f"{engine}.json"),
        f"data.train={train}", f"data.valid={valid}", f"run.folder={folder}", *overrides,
    ]  # fmt: skip


def stopping(script: Path, arguments: list[str], step: int) -> Command:
    """`script` with these arguments, which is asked to stop after a step."""
    return Command(["-c", STOPPING, str(script), str(step), *arguments])


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> everything that was logged of it, once."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(line["step"], {}).update(line)
    return found


def steady(folder: Path) -> dict[int, dict[str, float]]:
    """`figures` without those that depend on the clock."""
    return {
        step: {name: value for name, value in line.items() if not name.endswith(UNSTEADY) and name != "time"}
        for step, line in figures(folder).items()
    }


def check_same(folder: Path, expected: Path) -> None:
    """Figures of every step, and the last weights, are the same bits."""
    own, other = steady(folder), steady(expected)
    different = {
        (step, name): (own.get(step, {}).get(name), value)
        for step, line in other.items()
        for name, value in line.items()
        if own.get(step, {}).get(name) != value
    }
    assert not different, f"{len(different)} figures differ, the first: {min(different.items())}"
    weights, others = (read_weights(find_weights_folder(path)) for path in (folder, expected))
    assert weights.keys() == others.keys()
    assert not [name for name in others if not torch.equal(weights[name], others[name])]


def check_trained(folder: Path, *, falls_by: float = 0.1) -> str:
    """A finished run on this GPU: finite figures, a loss that falls. In a line, what it was like."""
    lines = figures(folder)
    steps = sorted(step for step, line in lines.items() if "loss" in line)
    losses = [lines[step]["loss"] for step in steps]
    assert (folder / "STATE").read_text() == "done\n"
    assert all(math.isfinite(value) for step in steps for value in lines[step].values() if isinstance(value, float))
    assert losses[-1] < losses[0] - falls_by
    device = json.loads((folder / "environment.json").read_text())["device"]
    assert device == torch.cuda.get_device_name()
    last = lines[steps[-1]]
    assert 0 < last["memory_gib"] <= last["reserved_memory_gib"]
    return (
        f"{device}: loss {losses[0]:.4f} … {losses[-1]:.4f} in {steps[-1]} steps, "
        f"{last['step_seconds']:.3f} s each, {last['memory_gib']:.3f} GiB, {last['reserved_memory_gib']:.3f} reserved"
    )
