"""Bytes per second between the GPUs of this machine, by the collectives that training uses: NCCL's, on a CPU gloo's.

Started by torchrun, one process for each GPU. The figure is what each device has to send at least, per second: of n
ranks and S bytes, all-reduce 2 (n − 1) / n · S, the others (n − 1) / n · S.

examples:
  torchrun --nproc_per_node=8 benchmarks/collectives.py
  torchrun --nproc_per_node=2 benchmarks/collectives.py --mib 1 --json collectives.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.errors import UserError

MIB = 2**20
REPEATS = 5


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 64, 1024], help="sizes (default: 1 64 1024)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


def collectives(whole: torch.Tensor, rank: int, size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """By name: what is run, and how often a device sends the whole's bytes."""
    part = whole.chunk(size)[rank].clone()
    once = (size - 1) / size
    return {
        "all-reduce": (lambda: dist.all_reduce(whole), 2 * once),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(part, whole), once),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part), once),
    }


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one of REPEATS, on the rank that takes longest."""
    run()
    wait(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait(device)
    taken = torch.tensor((time.perf_counter() - start) / REPEATS, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def wait(device: torch.device) -> None:
    """For everything that is queued, and everybody."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def run(arguments: argparse.Namespace) -> None:
    """Join, measure, tell. Raises UserError without a launcher."""
    if "LOCAL_RANK" not in os.environ:
        raise UserError("this is started by torchrun: torchrun --nproc_per_node=2 benchmarks/collectives.py")
    is_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if is_gpu else "cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device if is_gpu else None)
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for mib in arguments.mib:
        whole = torch.zeros(mib * MIB // 4 // size * size, device=device)
        for name, (exchange, sent) in collectives(whole, rank, size).items():
            speed = sent * whole.nbytes / seconds_of(exchange, device) / 1e9
            found.append({"collective": name, "mib": mib, "gb_per_second": speed})
            if rank == 0:
                print(f"{name:15} {mib:6} MiB {speed:8.2f} GB/s", flush=True)
    if rank == 0 and arguments.json:
        content = {"ranks": size, "backend": dist.get_backend(), "figures": found}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
