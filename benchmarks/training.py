"""Whole training steps as the commands make them: engine, data, forward, backward, update; none is saved.

A few steps of a preset on a dataset, after two to warm up: seconds, tokens per second, share of the device's peak by
the project's own count, memory beside what was planned, where the time of one step goes, and with `--trace` that step
as a trace. On several GPUs under a launcher: torchrun --nproc_per_node=8 benchmarks/training.py …

examples:
  python benchmarks/training.py --data data/train
  python benchmarks/training.py --data data/train --config xxlarge --json training.json --trace trace.json.gz \
      --deepspeed_config deepspeed_configs/zero1_bf16.json model.vocab_size=128100 train.global_batch_size=16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from benchmarks.replaced_tokens_cost import make_steps
from deberta_xl.base.launch import read_launch
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.commands.pretraining import PretrainingInputs, read_inputs
from deberta_xl.commands.pretraining import parse_arguments as parse_pretraining
from deberta_xl.commands.training_command import choose_accelerator, part_from_peers
from deberta_xl.training.assembly import assemble_training

WARM_UP_STEPS = 2
BUSIEST = 12
"""Operations that are listed."""
GIB = 2**30


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--data", required=True, help="prefix of a dataset made by tools/preprocess.py")
    parser.add_argument("--config", default="debug", help="preset or TOML file (default: debug)")
    parser.add_argument("--deepspeed_config", default="deepspeed_configs/cpu_debug.json", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--trace", type=Path, help="file for a trace of one step more (open it at ui.perfetto.dev)")
    parser.add_argument("--peak_tflops", type=float, default=989.0,
                        help="of a GPU, dense bfloat16 (default: %(default)s, an H100 or H200)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="such as train.micro_batch_size=4")
    return parser.parse_args(arguments)


def inputs_of(arguments: argparse.Namespace, folder: str) -> PretrainingInputs:
    """A run that neither saves nor evaluates."""
    settings = [f"data.train={arguments.data}", "data.valid=none", f"run.folder={folder}", "train.steps=1000"]
    settings += ["checkpoint.interval=1000", *arguments.overrides]
    given = ["--config", arguments.config, "--deepspeed_config", arguments.deepspeed_config, *settings]
    return read_inputs(parse_pretraining(given))


def figures(
    inputs: PretrainingInputs, seconds: list[float], device: torch.device, peak_tflops: float
) -> dict[str, Any]:
    """What the steps took, beside what was planned."""
    train, outlook = inputs.config.train, inputs.outlook
    typical = statistics.median(seconds)
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else "CPU"
    ranks = inputs.launch.world_size
    flops = outlook.work.step_flops(train.global_batch_size)
    held = torch.cuda.memory_stats() if is_gpu else {}
    return {
        "device": name,
        "ranks": ranks,
        "kernel": outlook.kernel,
        "parameters": outlook.work.num_parameters,
        "step_seconds": typical,
        "all_step_seconds": seconds,
        "tokens_per_second": train.global_batch_size * inputs.config.model.sequence_length / typical,
        "utilization": flops / typical / ranks / (1e12 * peak_tflops) if is_gpu else None,
        "planned_gib": max(memory.total for memory in outlook.memory()) / GIB,
        "allocated_gib": held["allocated_bytes.all.peak"] / GIB if held else None,
        "reserved_gib": held["reserved_bytes.all.peak"] / GIB if held else None,
    }


def profiled(steps: Iterator[float], device: torch.device, trace: Path | None) -> list[tuple[str, float, int]]:
    """One step more: its longest operations, (name, milliseconds, calls); the trace where it is asked for."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as recorded:
        next(steps)
        if is_gpu:
            torch.cuda.synchronize()
    if trace is not None:
        recorded.export_chrome_trace(str(trace))
    field = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, field))
    return [(event.key, getattr(event, field) / 1e3, event.count) for event in events[:BUSIEST]]


def run(arguments: argparse.Namespace) -> None:
    """Assemble, make the steps, tell."""
    choose_accelerator()
    with tempfile.TemporaryDirectory() as folder:
        # The run's folder has to be one place for all ranks.
        rank, world = read_launch().rank, read_launch().world_size
        place = f"{folder}/run" if world == 1 else f"{Path(arguments.data).parent}/steps-run"
        inputs = inputs_of(arguments, place)
        training = assemble_training(inputs, inputs.objective(), StopRequest(), describe=lambda: None)
        training.begin()
        device, steps = training.engine.device, make_steps(training)
        seconds = list(islice(steps, WARM_UP_STEPS + arguments.steps))[WARM_UP_STEPS:]
        found = figures(inputs, seconds, device, arguments.peak_tflops)
        busiest = profiled(steps, device, arguments.trace if rank == 0 else None)
        if rank == 0:
            tell(found, busiest)
            if arguments.json:
                arguments.json.write_text(json.dumps(found | {"busiest": busiest}, indent=1) + "\n", encoding="utf-8")
        training.heartbeat.close()
        part_from_peers()


def tell(found: dict[str, Any], busiest: list[tuple[str, float, int]]) -> None:
    """Lines for people."""
    for name, value in found.items():
        if value is not None:
            print(f"{name:20} {value}", flush=True)
    for name, milliseconds, calls in busiest:
        print(f"{milliseconds:10.2f} ms {calls:6} x {name[:80]}", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
