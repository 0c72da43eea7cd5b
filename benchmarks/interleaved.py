"""Several ways to the same result, by turns in one process: the time, what the fastest of them saves, the memory.

What else the machine does falls on all of them alike. Times are those of the process on a CPU, of the device on a GPU;
a ratio is the median over the turns. Memory is the most that was allocated at once beyond what was there before. A way
that cannot do a case, is not installed, or runs out of memory is a line that says so; one that fails in another way is
a line, too, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deberta_xl.base.command_line import build_parser
from deberta_xl.base.errors import ConfigError
from deberta_xl.model.part_costs import KERNELS

MIB = 2**20
WARM_UP = 2
CHECKED_LENGTH = 512
"""Of rows that are checked, at most: up to here all follow one rule of buckets."""
ANCHORS = ("transformers", "compiled", "flashdeberta", "disentangled-flash")
"""What others have: transformers' eager model, the same by torch.compile, two packages of kernels for GPUs."""


class Unable(Exception):
    """A way cannot do what is asked, and says why."""


EXPECTED = (Unable, ConfigError, ImportError, torch.OutOfMemoryError)
"""What keeps a way from a case without being a defect."""

Run = Callable[[], Sequence[Tensor]]
"""Computes once; returns what all ways should agree in."""


class Case(NamedTuple):
    """What is computed."""

    segments: Tensor
    """Number of the document of each token, [rows, length], on the device."""
    is_packed: bool
    rate: float
    """Of dropout."""

    @property
    def dtype(self) -> torch.dtype:
        """What is trained in on the device."""
        return torch.float32 if self.segments.device.type == "cpu" else torch.bfloat16

    def __str__(self) -> str:
        rows, length = self.segments.shape
        return f"{rows} x {length}{', packed' if self.is_packed else ''}, dropout {self.rate:g}"


class Way(NamedTuple):
    """Something to measure."""

    name: str
    make: Callable[[], Run]
    """Imports and builds; may raise one of EXPECTED, as the run may."""
    flops: float | None = None
    """Operations of a run, where they are counted."""


class Figure(NamedTuple):
    """What one way takes."""

    milliseconds: float
    """Median."""
    speed: float
    """Time of the first way over its own, median over turns."""
    peak_mib: float
    utilization: float | None = None
    """Operations that are counted, of those that a GPU could have done in that time; None where they are not, or on a
    CPU."""


class Measured(NamedTuple):
    """What came of a case."""

    figures: dict[str, Figure]
    failures: dict[str, Exception]
    """Of the ways that have no figure."""


WaysOf = Callable[[Case, argparse.Namespace], list[Way]]
Check = Callable[[Case, argparse.Namespace], dict[str, Exception]]
"""Ways whose result is wrong."""


class Disagreement(Exception):
    """A way computes something else."""


def parse_arguments(
    description: str, arguments: list[str] | None = None, *, has_anchors: bool = True
) -> argparse.Namespace:
    """The command line of these benchmarks."""
    is_on_gpu = torch.cuda.is_available()
    parser = build_parser(description)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], metavar="TOKENS", help="of a row")
    parser.add_argument(
        "--tokens", type=int, default=8192 if is_on_gpu else 1024,
        help="of a batch, at least a row (default: %(default)s here; 8192 on a GPU, 1024 on a CPU)",
    )  # fmt: skip
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="rates (default: 0 0.1)")
    parser.add_argument("--rows", choices=("dense", "packed"), nargs="+", default=["dense", "packed"],
                        help="one document a row, or four (default: both)")  # fmt: skip
    parser.add_argument(
        "--model", choices=("small", "xxlarge"), default="small", help="whose sizes (default: %(default)s)"
    )
    parser.add_argument("--kernels", choices=KERNELS, nargs="*", default=list(KERNELS), help="ours (default: all)")
    if has_anchors:
        parser.add_argument(
            "--anchors", choices=ANCHORS, nargs="*", default=[name for name in ANCHORS if name != "compiled"],
            help="beside them; all but `compiled`, which takes long to compile (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--turns", type=int, default=5 if is_on_gpu else 7,
        help="times that each way is measured (default: %(default)s here; 5 on a GPU, 7 on a CPU)",
    )  # fmt: skip
    parser.add_argument("--peak_tflops", type=float, default=989.0,
                        help="of a GPU, dense bfloat16 (default: %(default)s, an H100 or H200)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


def segments_of(rows: int, length: int, *, is_packed: bool) -> Tensor:
    """Documents of the rows: one each, or four of unequal length."""
    if not is_packed:
        return torch.ones(rows, length, dtype=torch.int64)
    ends = (torch.tensor([0.4, 0.7, 0.9]) * length).round()
    return torch.bucketize(torch.arange(length), ends, right=True).add(1).repeat(rows, 1)


def cases_of(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """Every case of the command line."""
    for length, rows, rate in product(options.lengths, options.rows, options.dropout):
        is_packed = rows == "packed"
        segments = segments_of(max(1, options.tokens // length), length, is_packed=is_packed)
        yield Case(segments.to(device), is_packed, rate)


def warm_up(way: Way) -> Run | Exception:
    """A way that works, built and warm, or why it does not."""
    try:
        run = way.make()
        for _ in range(WARM_UP):
            run()
    except Exception as error:
        error.__context__ = None  # with the frames, which hold what was allocated
        return error.with_traceback(None)
    return run


def free_memory() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(ways: list[Way], options: argparse.Namespace, device: torch.device) -> Measured:
    """Each way by turns; the first that works is what the others are compared with."""
    runs: dict[str, Run] = {}
    failures: dict[str, Exception] = {}
    for way in ways:
        found = warm_up(way)
        if isinstance(found, Exception):
            failures[way.name] = found
            free_memory()
        else:
            runs[way.name] = found
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.turns):
        for name, run in runs.items():
            times[name].append(milliseconds(run, device))
    first = next(iter(times.values()), [])
    flops = {way.name: way.flops for way in ways}
    possible = options.peak_tflops * 1e9 if device.type == "cuda" else None  # in a millisecond
    figures = {}
    for name, run in runs.items():
        taken = statistics.median(times[name])
        counted = flops[name]
        figures[name] = Figure(
            taken,
            statistics.median(base / own for base, own in zip(first, times[name], strict=True)),
            peak_bytes(run, device) / MIB,
            counted / taken / possible if counted and possible else None,
        )
    return Measured(figures, failures)


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """One turn."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return (time.process_time() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that was allocated at once, beyond what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def explain(error: Exception) -> str:
    """Why a way has no figure, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    first_line = str(error).strip().split("\n")[0]
    return first_line if isinstance(error, EXPECTED) else f"{type(error).__name__}: {first_line}"


def disagreements(ways: list[Way], expected: Sequence[Tensor], tolerance: float) -> dict[str, Exception]:
    """The ways one of whose results is further from the expected one than `tolerance` of its norm.

    Those that do not work are not among them: they say so when they are measured.
    """
    wrong: dict[str, Exception] = {}
    for way in ways:
        try:
            results = way.make()()
        except Exception:
            continue
        errors = [
            float((result.float() - true).norm() / true.norm()) for result, true in zip(results, expected, strict=True)
        ]
        if not max(errors) <= tolerance:
            listed = ", ".join(f"{error:.2g}" for error in errors)
            wrong[way.name] = Disagreement(f"its results are off by {listed} of their norms, more than {tolerance:g}")
    return wrong


def compare(options: argparse.Namespace, ways_of: WaysOf, check: Check) -> int:
    """Measure every case of the command line and print a table; returns the exit status.

    Before that, `check` is given a small case of each kind; what is wrong there is not measured.
    """
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong: dict[bool, dict[str, Exception]] = {}
    told: set[str] = set()
    print(f"{'case':34} {'way':18} {'ms':>9} {'speed':>7} {'peak MiB':>9}", flush=True)
    cases, status = [], 0
    for case in cases_of(options, device):
        if case.is_packed not in wrong:
            segments = segments_of(2, min(CHECKED_LENGTH, min(options.lengths)), is_packed=case.is_packed)
            wrong[case.is_packed] = check(Case(segments.to(device), case.is_packed, 0.0), options)
        ways = [way for way in ways_of(case, options) if way.name not in wrong[case.is_packed]]
        measured = measure(ways, options, device)
        measured.failures.update(wrong[case.is_packed])
        for name, figure in measured.figures.items():
            print(line_of(case, name, figure), flush=True)
        for name, error in measured.failures.items():
            status = status if isinstance(error, EXPECTED) else 1
            line = f"{name:18} not measured: {explain(error)}"
            if isinstance(error, torch.OutOfMemoryError) or line not in told:
                print(f"{case!s:34} {line}", flush=True)
                told.add(line)
        cases.append(record(case, measured))
        free_memory()
    if options.json:
        write_json(options, device, cases)
    return status


def line_of(case: Case, name: str, figure: Figure) -> str:
    """A line of the table."""
    share = "" if figure.utilization is None else f"  {figure.utilization:.1%} of peak"
    return f"{case!s:34} {name:18} {figure.milliseconds:9.1f} {figure.speed:7.2f} {figure.peak_mib:9.1f}{share}"


def write_json(options: argparse.Namespace, device: torch.device, cases: list[dict[str, Any]]) -> None:
    """All figures, and where they were measured."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {options.threads}"
    content = {"device": where, "torch": torch.__version__, "model": options.model, "cases": cases}
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def record(case: Case | str, measured: Measured) -> dict[str, Any]:
    """A case for the JSON file."""
    ways = {name: figure._asdict() for name, figure in measured.figures.items()}
    return {
        "case": str(case),
        "ways": ways,
        "not_measured": {name: explain(error) for name, error in measured.failures.items()},
    }
