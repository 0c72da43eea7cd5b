"""What this machine computes on, and how fast it multiplies and copies: written as JSON, and a line for each fact.

examples:
  python benchmarks/device_facts.py
  python benchmarks/device_facts.py --json facts.json
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool

GIB = 2**30
PACKAGES = ("deepspeed", "megatron-core", "triton", "transformers", "flashdeberta", "disentangled-flash")
REPEATS = 10
MULTIPLIED = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}
"""Rows of the square matrices, and their type."""
COPIED = {"cuda": 2**30, "cpu": 2**26}
"""Bytes."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--json", type=Path, help="file to write the facts to")
    return parser.parse_args(arguments)


def libraries() -> dict[str, Any]:
    """Versions of what is computed with; None where it is not there."""

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "driver": driver_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def driver_version() -> str | None:
    """NVIDIA's, as nvidia-smi tells it; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def devices() -> list[dict[str, Any]]:
    """Every GPU that torch can use."""
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append({
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / GIB,
            "multiprocessors": properties.multi_processor_count,
        })  # fmt: skip
    return found


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one of REPEATS, after as many to warm up."""
    for _ in range(REPEATS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / REPEATS


def speeds(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large product of matrices, and GB/s of a copy, read and written bytes counted."""
    num_rows, dtype = MULTIPLIED[device.type]
    a_NN = torch.randn(num_rows, num_rows, device=device).to(dtype)
    b_NN, product_NN = torch.randn_like(a_NN), torch.empty_like(a_NN)
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    room = torch.empty_like(source)
    return {
        "product_tflops": 2 * num_rows**3 / seconds_of(lambda: torch.mm(a_NN, b_NN, out=product_NN), device) / 1e12,
        "copy_gb_per_second": 2 * source.numel() / seconds_of(lambda: room.copy_(source), device) / 1e9,
    }


def run(arguments: argparse.Namespace) -> None:
    """Look, measure, tell."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"devices": devices(), "host": platform.processor() or platform.machine(), **libraries(), **speeds(device)}
    for name, value in facts.items():
        print(f"{name:20} {value}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
