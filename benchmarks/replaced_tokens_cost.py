"""What a step of replaced token detection costs beside one of masked language modelling with the same encoder.

Two processes, each with its own engine, make a step by turns on this machine's CPU, so that both see the same load; the
ratio is the median over pairs of steps. Beside what was planned stands what the engine holds: parameters and optimizer
states, counted, and the growth of the process at its fullest. SETTING=VALUE goes to both.

examples:
  python benchmarks/replaced_tokens_cost.py --data data/train
  python benchmarks/replaced_tokens_cost.py --data data/train --config v3_xsmall train.micro_batch_size=2 \
      train.global_batch_size=2 model.vocab_size=none
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.checkpoint.fragments import canonical_parameters, engine_fragments
from deberta_xl.commands.pretraining import PretrainingInputs, read_inputs
from deberta_xl.commands.pretraining import parse_arguments as parse_pretraining
from deberta_xl.model.parts import forward_flops
from deberta_xl.training.assembly import assemble_training
from deberta_xl.training.loop import Training

ENGINE = Path(__file__).resolve().parent.parent / "deepspeed_configs" / "cpu_debug.json"
OBJECTIVES = ("masked_lm", "replaced_tokens")
WARM_UP_STEPS = 2
MIB = 2**20
KIBIBYTE = 1024
"""The system's unit of a process's size."""
FORGET_PEAK = "5"
LARGE_BLOCKS_GO_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""So that what a tensor has taken is given back to the system with it, and the peak is that of tensors."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--data", required=True, help="prefix of a dataset made by tools/preprocess.py")
    parser.add_argument("--config", default="v3_debug", help="preset or TOML file (default: v3_debug)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps that are measured (default: 10)")
    parser.add_argument("--child", choices=OBJECTIVES, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="for both, such as model.num_layers=6")
    return parser.parse_args(arguments)


# One of the two processes.


def inputs_of(arguments: argparse.Namespace, objective: str, folder: str) -> PretrainingInputs:
    """A run that neither saves nor evaluates."""
    settings = [f"data.train={arguments.data}", "data.valid=none", f"run.folder={folder}", "train.steps=100000"]
    settings += ["checkpoint.interval=100000", *arguments.overrides, f"train.objective={objective}"]
    return read_inputs(parse_pretraining(["--config", arguments.config, "--deepspeed_config", str(ENGINE), *settings]))


def serve(arguments: argparse.Namespace) -> None:
    """Make a step for each line on standard input and tell its seconds; at the end tell what is held."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = inputs_of(arguments, arguments.child, f"{folder}/run")
        training = assemble_training(inputs, inputs.objective(), StopRequest(), describe=lambda: None)
        training.begin()
        steps, seconds_of = make_steps(training), time_updates(training)
        without = resident("VmRSS") - sum(held_bytes(training).values())
        Path("/proc/self/clear_refs").write_text(FORGET_PEAK)
        for _ in sys.stdin:
            tell(next(steps))
        found = {"parameters": parameters_of(training), "held": held_bytes(training), "seconds_of": seconds_of}
        tell(found | {"fullest": resident("VmHWM") - without} | planned(inputs))


def tell(value: Any) -> None:
    """One line for the other side; what else stands on standard output has no such mark."""
    print("@", json.dumps(value), flush=True)


def resident(name: str) -> int:
    """The size of this process, now (VmRSS) or at its fullest (VmHWM), in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return KIBIBYTE * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:"))


def make_steps(training: Training) -> Iterator[float]:
    """The loop's steps without what comes between them; the seconds of each."""
    for step, (micro_batches, counts) in enumerate(training.agreed_steps(), 1):
        training.recorder.begin_step(step)
        start = time.perf_counter()
        training.step(step, micro_batches, counts)
        yield time.perf_counter() - start


def time_updates(training: Training) -> dict[str, float]:
    """Seconds of all updates by what learns in them; filled as the steps are made."""
    seconds: dict[str, float] = defaultdict(float)
    update = training.update

    def timed(*given: Any, learner: str | None = None, **more: Any) -> Any:
        start = time.perf_counter()
        figures = update(*given, learner=learner, **more)
        seconds[learner or "all"] += time.perf_counter() - start
        return figures

    training.update = timed
    return seconds


def parameters_of(training: Training) -> dict[str, int]:
    """Elements of the parameters that the engine holds, by model."""
    numel: dict[str, int] = defaultdict(int)
    for name, parameter in canonical_parameters(training.engine):
        model = name.partition(".")[0]
        numel[model if model in ("generator", "discriminator") else "model"] += parameter.numel()
    return numel


def held_bytes(training: Training) -> dict[str, int]:
    """What the engine keeps between steps: weights, and the optimizer's master weights and moments."""
    parameters, states = canonical_parameters(training.engine), training.engine.optimizer.state
    flats = {id(fragment.flat): fragment.flat for fragment in engine_fragments(training.engine, parameters)}.values()
    moments = [value for flat in flats for value in states[flat].values() if isinstance(value, torch.Tensor)]
    return {
        "weights": sum(parameter.nbytes for _, parameter in parameters),
        "optimizer": sum(tensor.nbytes for tensor in [*flats, *moments]),
    }


def planned(inputs: PretrainingInputs) -> dict[str, Any]:
    """What the start of the run says."""
    outlook, (memory,) = inputs.outlook, inputs.outlook.memory()
    parts = outlook.work.parts
    of_generator = [part for part in parts if part.name.startswith("generator.")]
    example = outlook.work.example
    return {
        "planned": memory._asdict() | {"total": memory.total},
        "flops": outlook.work.step_flops(inputs.config.train.global_batch_size),
        "generator_share": forward_flops(of_generator, example) / forward_flops(parts, example) if of_generator else 0,
    }


# The one that asks both.


class Child:
    """The other process."""

    def __init__(self, arguments: argparse.Namespace, objective: str):
        command = [sys.executable, __file__, "--child", objective, "--data", arguments.data]
        command += ["--config", arguments.config, *arguments.overrides]
        environment = {**os.environ, **LARGE_BLOCKS_GO_BACK, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment.setdefault("OMP_NUM_THREADS", "1")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)

    def answer(self) -> Any:
        """What it tells next. Raises EOFError when it has ended instead."""
        stream: IO[str] = self.process.stdout
        for line in stream:
            if line.startswith("@ "):
                return json.loads(line[2:])
        raise EOFError(f"the process of {self.process.args[3]} has ended; its words are above")

    def step(self) -> float:
        """Seconds of a step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> dict[str, Any]:
        """Let it end; what it held."""
        self.process.stdin.close()
        found = self.answer()
        self.process.wait()
        return found


def run(arguments: argparse.Namespace) -> None:
    """Measure and tell."""
    if arguments.child:
        serve(arguments)
        return
    children = [Child(arguments, objective) for objective in OBJECTIVES]
    pairs = [[child.step() for child in children] for _ in range(WARM_UP_STEPS + arguments.pairs)][WARM_UP_STEPS:]
    masked, replaced = (child.end() for child in children)
    times = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratios = sorted(second / first for first, second in pairs)
    print(f"time of a step: masked LM {times[0]:.3f} s, replaced tokens {times[1]:.3f} s")
    print(f"  ratio {statistics.median(ratios):.2f} (of single pairs {ratios[0]:.2f} … {ratios[-1]:.2f})")
    if "generator" in (seconds := replaced["seconds_of"]):
        print(f"  generator's share {seconds['generator'] / sum(seconds.values()):.0%}")
    print(f"operations: ratio {replaced['flops'] / masked['flops']:.2f}, generator's {replaced['generator_share']:.0%}")
    print(f"memory at its fullest: ratio {replaced['fullest'] / masked['fullest']:.2f}")
    for objective, found in zip(OBJECTIVES, (masked, replaced), strict=True):
        print_memory(objective, found)


def print_memory(objective: str, found: dict[str, Any]) -> None:
    """Planned and held, of one process."""
    plan = found["planned"]
    sizes = ", ".join(f"{name} {numel:,}" for name, numel in found["parameters"].items())
    print(f"{objective}: {sizes} parameters held; {plan['num_parameters']:,} planned")
    measured = found["held"] | {"total": found["fullest"]}
    for name, label in (("weights", "weights"), ("optimizer", "optimizer"), ("total", "at its fullest")):
        ratio = plan[name] / measured[name]
        print(f"  {label:<15} planned {plan[name] / MIB:9.2f} MiB, there {measured[name] / MIB:9.2f} MiB ({ratio:.3f})")


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
