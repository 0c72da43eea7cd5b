r"""Fine-tune a small encoder on ten real tasks: pretrained or fresh weights, without SiFT and with it, several seeds.

Each run is one command of deberta_xl/finetune.py, which is shown; the tables at the end are tools/table.py's. What
is finished is not made again. DATA has a folder for each task with the files as they are published (see TASKS).

examples:
  python tools/quickstart.py --folder encoder --corpus TEXTS --vocab_size 8000 -- \
      train.steps=2800 schedule.warmup_steps=200
  python benchmarks/real_tasks.py --encoder encoder/run --data DATA --output runs/tasks
  python benchmarks/real_tasks.py --encoder encoder/run --data DATA --output runs/tasks --tasks trec cb --variants sift
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    "model.sequence_length=128", "model.dropout=0.1", "train.micro_batch_size=32", "optimizer.learning_rate=5e-4",
]  # fmt: skip


class Trial(NamedTuple):
    """A task, where its files are, and what it needs beside COMMON."""

    task: str
    folder: str
    overrides: tuple[str, ...] = ()


FEW = ("train.epochs=10",)
TASKS = {
    "sst2": Trial("sst2", "sst2"),
    "cola": Trial("cola", "glue-cola"),
    "rte": Trial("rte", "glue-rte"),
    "stsb": Trial("stsb", "glue-stsb"),
    "cb": Trial("cb", "superglue-cb", FEW),
    "copa": Trial("copa", "superglue-copa", FEW),
    "sick": Trial("sick", "nli-sick"),
    "trec": Trial("trec", "trec"),
    "boolq": Trial("boolq", "superglue-fewglue/BoolQ", (*FEW, "evaluation.interval=5")),
    "xquad": Trial("benchmarks/xquad.toml", "xquad-en", (*FEW, "task.valid_share=0.2", "model.document_stride=64")),
}
VARIANTS = {
    "pretrained": (),
    "fresh": ("train.fresh_weights=true",),
    "sift": ("sift.weight=5",),
    "sift_original": ("sift.weight=5", "sift.variant=original"),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="a pretraining run, checkpoint or weights folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--output", type=Path, required=True, help="where the runs go, as TASK/VARIANT-SEED")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
    return parser.parse_args(arguments)


def folder_of(arguments: argparse.Namespace, name: str, variant: str, seed: int) -> Path:
    """Where a run keeps everything."""
    return arguments.output / name / f"{variant}-{seed}"


def command_of(arguments: argparse.Namespace, name: str, variant: str, seed: int) -> list[str]:
    """The one command of a run."""
    trial, folder = TASKS[name], folder_of(arguments, name, variant, seed)
    files = ["--task", trial.task, "--data", arguments.data / trial.folder, "--init", arguments.encoder]
    settings = ["--config", "finetune", "--deepspeed_config", "deepspeed_configs/cpu_debug.json"]
    run = [f"run.folder={folder}", f"train.seed={seed}"]
    overrides = [*COMMON, *trial.overrides, *VARIANTS[variant]]
    return [str(word) for word in ("python", "deberta_xl/finetune.py", *settings, *files, *run, *overrides)]


def run_all(commands: Sequence[list[str]], jobs: int) -> None:
    """Run commands of the repository to their end, some at a time, each on one core, and show them as they end.

    Raises UserError for the first that fails, and begins no other.
    """
    with ThreadPoolExecutor(jobs) as pool:
        for command, (complaint, seconds) in zip(commands, pool.map(execute, commands), strict=True):
            print(f"$ {shlex.join(command)}\n  {seconds:.0f} s", flush=True)
            if complaint:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"the command above failed:\n{complaint}")


def agree_on_sources(output: Path, sources: Mapping[str, object]) -> None:
    """Note in `output` what its runs are made of. Raises UserError where those there are made of other things."""
    note = output / "made_of.json"
    text = json.dumps(sources, indent=1, ensure_ascii=False)
    if note.exists() and note.read_text(encoding="utf-8") != text:
        raise UserError(f"{note} names other sources than those given now: give the same, or another --output")
    output.mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")


def execute(command: list[str]) -> tuple[str, float]:
    """Run a command to its end; what went wrong ("" if nothing did), and the seconds it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process.stdout[-2000:] if process.returncode else "", time.monotonic() - start


def run(arguments: argparse.Namespace) -> None:
    """All runs, then a table of each task."""
    for key in ("encoder", "data", "output"):
        setattr(arguments, key, getattr(arguments, key).resolve())
    places = [(n, v, s) for s in arguments.seeds for n in arguments.tasks for v in arguments.variants]
    unfinished = [place for place in places if not (folder_of(arguments, *place) / "results.json").exists()]
    run_all([command_of(arguments, *place) for place in unfinished], arguments.jobs)
    for name in arguments.tasks:
        patterns = [str(arguments.output / name / f"{variant}-*") for variant in arguments.variants]
        subprocess.run([sys.executable, ROOT / "tools" / "table.py", *patterns], check=True)


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
