"""Several ways to the same result, by turns in one process: the time, what the fastest of them saves, the memory.

What else the machine does falls on all of them alike. Times are those of the process on a CPU, of the device on a GPU;
a ratio is the median over the turns. Memory is the most that was allocated at once beyond what was there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from deberta_xl.base.command_line import build_parser

MIB = 2**20
WARM_UP = 2


class Way(NamedTuple):
    """Something to measure."""

    name: str
    run: Callable[[], Any]


class Figure(NamedTuple):
    """What one way takes."""

    milliseconds: float
    """Median."""
    speed: float
    """Time of the first way over its own, median over turns."""
    peak_mib: float


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of both benchmarks."""
    parser = build_parser(description)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], metavar="TOKENS", help="of a row")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, at least a row (default: %(default)s)")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="rates (default: 0 0.1)")
    parser.add_argument("--kernels", nargs="+", default=["reference", "strided"], help="ours (default: all of them)")
    parser.add_argument("--turns", type=int, default=7, help="times that each way is measured (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


def segments_of(rows: int, length: int, *, is_packed: bool) -> torch.Tensor:
    """Documents of the rows: one each, or four of unequal length."""
    if not is_packed:
        return torch.ones(rows, length, dtype=torch.int64)
    ends = (torch.tensor([0.4, 0.7, 0.9]) * length).round()
    return torch.bucketize(torch.arange(length), ends, right=True).add(1).repeat(rows, 1)


def measure(ways: list[Way], turns: int, device: torch.device) -> dict[str, Figure]:
    """Each way by turns; the first is what the others are compared with."""
    for way in ways * WARM_UP:
        way.run()
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(turns):
        for way in ways:
            times[way.name].append(milliseconds(way.run, device))
    first = times[ways[0].name]
    return {
        way.name: Figure(
            statistics.median(times[way.name]),
            statistics.median(base / own for base, own in zip(first, times[way.name], strict=True)),
            peak_bytes(way.run, device) / MIB,
        )
        for way in ways
    }


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


def compare(options: argparse.Namespace, ways_of: Callable[[torch.Tensor, float, list[str]], list[Way]]) -> None:
    """Measure every case of the command line and print a table.

    `ways_of` is given the documents of a batch, [rows, length] on the device, the rate of dropout, and kernels' names.
    """
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'case':34} {'way':16} {'ms':>9} {'speed':>7} {'peak MiB':>9}", flush=True)
    cases = []
    for length, is_packed, rate in product(options.lengths, (False, True), options.dropout):
        rows = max(1, options.tokens // length)
        segments = segments_of(rows, length, is_packed=is_packed).to(device)
        figures = measure(ways_of(segments, rate, options.kernels), options.turns, device)
        name = f"{rows} x {length}{', packed' if is_packed else ''}, dropout {rate:g}"
        for way, (milliseconds, speed, peak) in figures.items():
            print(f"{name:34} {way:16} {milliseconds:9.1f} {speed:7.2f} {peak:9.1f}", flush=True)
        cases.append({"case": name, "ways": {way: figure._asdict() for way, figure in figures.items()}})
    if options.json:
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {options.threads}"
        text = json.dumps({"device": where, "torch": torch.__version__, "cases": cases}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
