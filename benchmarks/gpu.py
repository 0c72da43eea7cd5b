"""Everything that the GPUs of this machine are asked, within ten minutes, and a report of it.

Facts and speeds of the devices; the tests that need one (equality with the CPU, the same bits again and after a resume,
every engine and precision, memory as planned); whole steps of the 1.5B preset with a trace of one; a layer, attention
and a step beside what others have; inference; what the GPUs send each other. A part that this machine cannot do is
skipped with the reason, one that takes too long is ended. What each said is in OUTPUT/log, the report in
OUTPUT/report.md and OUTPUT/report.json. The exit status is 1 if a part failed.

examples:
  make gpu
  python benchmarks/gpu.py --parts facts training
  python benchmarks/gpu.py --rehearse --output runs/rehearsal  # everything small on the CPU: does it all work?
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from benchmarks.gpu_report import Outcome, read_results, write_report
from deberta_xl.base.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
GRACE_SECONDS = 15
"""Between a request to end and the end."""


class Machine(NamedTuple):
    """What can be used."""

    num_devices: int
    """GPUs; 0 for a rehearsal on the CPU."""
    gibibytes: float
    """Memory of the smallest."""

    @property
    def is_rehearsal(self) -> bool:
        """Whether everything is to be small."""
        return self.num_devices == 0


Words = list[str]
"""A command, after `python`."""


class Part(NamedTuple):
    """Something that is asked."""

    words: str
    seconds: float
    """That it may take, at most."""
    commands: Callable[[Path, Machine], list[Words]]
    """Given the folder of the report."""
    refusal: Callable[[Machine], str | None] = lambda machine: None
    """Why this machine cannot do it."""


def launched(machine: Machine, script: str) -> Words:
    """`script` on every device; a rehearsal has two processes."""
    return ["-m", "torch.distributed.run", f"--nproc_per_node={machine.num_devices or 2}", script]


def facts(output: Path, machine: Machine) -> list[Words]:
    """What is here."""
    return [["benchmarks/device_facts.py", "--json", f"{output}/facts.json"]]


def tests(output: Path, machine: Machine) -> list[Words]:
    """All that have the mark; without a device they skip themselves."""
    workers = "0" if machine.is_rehearsal else "4"
    return [["-m", "pytest", "-m", "gpu", "-n", workers, "-rP", f"--junitxml={output}/tests.xml", "tests/gpu"]]


def training(output: Path, machine: Machine) -> list[Words]:
    """A dataset made of the project's own documents, and steps on it."""
    data = output / "data"
    data.mkdir(exist_ok=True)
    corpus = data / "corpus.txt"
    corpus.write_text(
        "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))), encoding="utf-8"
    )
    tokenizer = ["tools/train_tokenizer.py", "--allow_smaller", "--vocab_size", "2000", "--input", str(corpus)]
    dataset = ["tools/preprocess.py", "--tokenizer", f"{data}/tokenizer", "--input", str(corpus), "--overwrite"]
    steps = ["--data", f"{data}/train", "--json", f"{output}/training.json", "--trace", f"{output}/trace.json.gz"]
    if machine.is_rehearsal:
        script, sizes = ["benchmarks/training.py"], ["--config", "debug", "--steps", "2"]
    else:
        script = launched(machine, "benchmarks/training.py")
        batch = 16 * machine.num_devices
        sizes = [
            "--config", "xxlarge", "--deepspeed_config", "deepspeed_configs/zero1_bf16.json", "model.vocab_size=128100",
            "train.micro_batch_size=8", f"train.global_batch_size={batch}",
        ]  # fmt: skip
    made = [] if (data / "tokenizer").exists() else [[*tokenizer, "--output", f"{data}/tokenizer"]]
    return [*made, [*dataset, "--output", f"{data}/train"], [*script, *steps, *sizes]]


def compared(script: str, *sizes: str, name: str | None = None) -> Callable[[Path, Machine], list[Words]]:
    """One of the benchmarks that compare, its figures in a file of that name."""

    def commands(output: Path, machine: Machine) -> list[Words]:
        small = ["--lengths", "64", "--tokens", "64", "--turns", "1"] if machine.is_rehearsal else [*sizes]
        return [[f"benchmarks/{script}.py", *small, "--json", f"{output}/{name or script}.json"]]

    return commands


def inference(output: Path, machine: Machine) -> list[Words]:
    """Many texts."""
    sizes = ["--texts", "4", "--turns", "1"] if machine.is_rehearsal else ["--texts", "2048"]
    return [["benchmarks/inference.py", *sizes, "--json", f"{output}/inference.json"]]


def collectives(output: Path, machine: Machine) -> list[Words]:
    """Between all devices."""
    sizes = ["--mib", "1"] if machine.is_rehearsal else []
    return [[*launched(machine, "benchmarks/collectives.py"), *sizes, "--json", f"{output}/collectives.json"]]


def needs_gibibytes(gibibytes: float) -> Callable[[Machine], str | None]:
    """A refusal of devices with less memory."""

    def refusal(machine: Machine) -> str | None:
        if machine.is_rehearsal or machine.gibibytes >= gibibytes:
            return None
        return f"takes {gibibytes:g} GiB of GPU memory, there are {machine.gibibytes:.0f}"

    return refusal


def needs_several(machine: Machine) -> str | None:
    """A refusal of one device alone."""
    return "there is one GPU: it has nobody to exchange with" if machine.num_devices == 1 else None


LARGE = ("--model", "xxlarge", "--rows", "dense", "--lengths", "512", "8192")
STEP = (*LARGE[:4], "--lengths", "512", "--dropout", "0.1", "--kernels", "fused", "strided")
PARTS = {
    "facts": Part("devices, libraries, speeds", 40, facts),
    "tests": Part("equality with the CPU, the same bits again and after a resume, engines, memory", 240, tests),
    "training": Part("whole steps of the 1.5B preset", 120, training, needs_gibibytes(60)),
    "layer": Part("one layer of the 1.5B preset", 40, compared("layer", *LARGE)),
    "attention_xxlarge": Part(
        "attention of the 1.5B preset", 60, compared("attention", *LARGE, name="attention_xxlarge")
    ),
    "step_xxlarge": Part(
        "forward and backward of the 1.5B preset", 60, compared("step", *STEP, name="step_xxlarge"), needs_gibibytes(60)
    ),
    "attention": Part("attention with 6 heads", 60, compared("attention")),
    "step": Part("forward and backward of a small model", 60, compared("step")),
    "inference": Part("classifying many texts", 40, inference),
    "collectives": Part("what the devices send each other", 40, collectives, needs_several),
}
"""In the order of their worth, in case that time runs out."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: %(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    return parser.parse_args(arguments)


def look_around(*, rehearses: bool) -> Machine:
    """What can be used. Raises UserError where torch finds no GPU."""
    if rehearses:
        return Machine(0, 0.0)
    count = torch.cuda.device_count()
    if not count:
        raise UserError(
            f"torch {torch.__version__} finds no GPU here (does nvidia-smi?). To see whether all of this works: "
            "python benchmarks/gpu.py --rehearse --output runs/rehearsal"
        )
    return Machine(count, min(torch.cuda.get_device_properties(n).total_memory for n in range(count)) / GIB)


def revision() -> str | None:
    """Of the code; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def execute(words: Words, log: Path, seconds: float, machine: Machine) -> tuple[str, str]:
    """Run a command, for so long at most; its outcome, and why, in a line."""
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if machine.is_rehearsal else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **on_cpu}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "out of time", f"ended after {seconds:.0f} s"
        finally:
            end_all(process)
    return ("done", "") if status == 0 else ("failed", f"exit status {status}; see {log}")


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Ask a command that still runs to end, then end it and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask(name: str, part: Part, output: Path, machine: Machine, seconds: float) -> Outcome:
    """One part, in so much time at most."""
    if refused := part.refusal(machine):
        return Outcome(name, part.words, "skipped", refused, 0.0)
    log = output / "log" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in (log, output / f"{name}.json", output / f"{name}.xml"):  # or an earlier run's would be reported
        old.unlink(missing_ok=True)
    start, outcome, reason = time.monotonic(), "done", ""
    limit = min(part.seconds, seconds)
    for words in part.commands(output, machine):
        left = limit - (time.monotonic() - start)
        outcome, reason = execute(words, log, left, machine) if left > 1 else ("out of time", "no time was left for it")
        if outcome != "done":
            break
    return Outcome(name, part.words, outcome, reason, time.monotonic() - start)


def run(arguments: argparse.Namespace) -> None:
    """Ask all parts, write the report. Raises UserError where one failed."""
    machine = look_around(rehearses=arguments.rehearse)
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    outcomes = []
    for name in arguments.parts:
        print(f"{name}: {PARTS[name].words} …", flush=True)
        outcome = ask(name, PARTS[name], output, machine, end - time.monotonic())
        print(f"  {outcome}", flush=True)
        outcomes.append(outcome)
    about = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "revision": revision(), **machine._asdict()}
    report = write_report(output, about, outcomes, read_results(output, outcomes))
    print(f"\n{report}\nwritten to {output}/report.md and {output}/report.json", flush=True)
    if failed := [outcome.name for outcome in outcomes if outcome.outcome == "failed"]:
        raise UserError(f"failed: {', '.join(failed)}; what was said is in {output}/log")


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), waits=True))
