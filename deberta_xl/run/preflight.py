"""A short look at every node of a job before training: what fails here would cost hours there.

srun python -m deberta_xl.run.preflight RUN_FOLDER      (one per rank, as training will be started)

Each rank looks at its own device (there, its own, multiplies matrices rightly), the node's shared memory, the free
disk of the run folder and the clock, and reports to rank 0 over a plain socket. Rank 0 names whoever has a complaint or
does not report; then all ranks sum a tensor together. When nodes are to blame, it ends with status 3 and their names in
RUN_FOLDER/slurm/bad_nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_xl.base.command_line import build_parser
from deberta_xl.base.errors import ConfigError, counted
from deberta_xl.base.launch import Launch, device_number, node_name, read_launch
from deberta_xl.base.log import configure_logging, logger, rank_zero
from deberta_xl.run.devices import why_unusable
from deberta_xl.run.rendezvous import export_launch

PORT_SHIFT = -10000
"""From training's port to the pre-flight's: a late rank must not meet the other one's ranks."""
PATIENCE = timedelta(seconds=120)
"""How long ranks may be late, and how long a sum over all of them may take."""
CLOCK_SKEW_SECONDS = 60.0
"""File times and logs of nodes further apart than this mislead people, and certificates fail."""
DISK_GIB = 1.0
SHARED_MEMORY_MIB = 64.0
"""NCCL's and the loader's buffers; containers often have less."""
BAD_NODES = 3
"""Exit status when nodes are to blame."""
GPU_SIZE, CPU_SIZE = 4096, 256
SUMMED = 2**20
"""Elements of the sum over all ranks: 8 MiB."""
SLOW = 0.7
"""A device that multiplies at less than this share of the median is pointed out."""


def look(launch: Launch, run_folder: Path) -> dict[str, Any]:
    """This rank's report: `complaints`, the device's `uuid` (None on a CPU) and its speed."""
    complaints, uuid, flops = [], None, None
    allotted = (os.environ.get("SLURM_STEP_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")).split(",")
    is_cpu_meant = os.environ.get("DS_ACCELERATOR") == "cpu" or allotted == [""]
    if torch.cuda.is_available():
        try:
            torch.cuda.set_device(device_number(launch.local_rank, torch.cuda.device_count()))
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        except ConfigError as error:
            complaints.append(str(error))
    elif not is_cpu_meant:
        are = "is" if len(allotted) == 1 else "are"
        shown = f"{counted(len(allotted), 'GPU')} {are} allotted, but torch {torch.__version__} sees none"
        complaints.append(f"{shown}: {why_unusable()}")
    try:
        flops = multiply("cuda" if uuid else "cpu")
    except (RuntimeError, ArithmeticError) as error:
        complaints.append(f"a matrix product failed: {error}")
    for what, folder, needed in (
        ("the run folder", run_folder, DISK_GIB * 2**30),
        ("/dev/shm", Path("/dev/shm"), SHARED_MEMORY_MIB * 2**20),
    ):
        if folder.exists() and (free := shutil.disk_usage(folder).free) < needed:
            complaints.append(f"{what} has {free / 2**20:,.0f} MiB free; needed: {needed / 2**20:,.0f}")
    return {
        "node": node_name(), "rank": launch.rank, "complaints": complaints, "uuid": uuid, "flops": flops,
        "time": time.time(),
    }  # fmt: skip


def multiply(device: str) -> float:
    """FLOP/s of a product of matrices whose result is known. Raises ArithmeticError when it is wrong."""
    size = GPU_SIZE if device == "cuda" else CPU_SIZE
    ones = torch.ones(size, size, device=device)
    product = ones @ ones  # the first product also loads the library
    start = time.perf_counter()
    for _ in range(3):
        product = ones @ ones
    is_right = bool((product == size).all())  # waits for the device
    seconds = time.perf_counter() - start
    if not is_right:
        raise ArithmeticError("its result is wrong")
    return 3 * 2 * size**3 / seconds


def judge(reports: Sequence[dict[str, Any]], silent: Sequence[str]) -> dict[str, list[str]]:
    """Node -> what is wrong with it; `silent` are the nodes of ranks that did not report."""
    wrong: dict[str, list[str]] = {}
    for node in dict.fromkeys(silent):
        count = silent.count(node)
        wrong[node] = [
            f"{counted(count, 'rank')} did not report within {PATIENCE.seconds} s; look at the network and at slurmd"
        ]
    users: dict[str, dict[str, Any]] = {}
    for report in reports:
        node, complaints = report["node"], list(report["complaints"])
        skew = report["arrived"] - report["time"] if report["rank"] else 0.0
        if abs(skew) > CLOCK_SKEW_SECONDS:
            complaints.append(f"its clock differs by {skew:+.0f} s from the first node's; mend time synchronisation")
        if (uuid := report["uuid"]) and (other := users.setdefault(uuid, report)) is not report:
            complaints.append(f"ranks {other['rank']} and {report['rank']} were given the same GPU {uuid}")
        wrong.setdefault(node, []).extend(text for text in complaints if text not in wrong[node])
    return {node: texts for node, texts in wrong.items() if texts}


def collect(store: dist.TCPStore, own: dict[str, Any], world_size: int, nodes: Sequence[str]) -> list[Any]:
    """Rank 0: every rank's report as it arrives, or the node's name of a rank that sends none in time."""
    reports: list[Any] = [{**own, "arrived": time.time()}]
    deadline = time.monotonic() + PATIENCE.total_seconds()
    waiting = set(range(1, world_size))
    while waiting and time.monotonic() < deadline:
        for rank in [rank for rank in waiting if store.check([f"report/{rank}"])]:
            reports.append({**json.loads(store.get(f"report/{rank}")), "arrived": time.time()})
            waiting.remove(rank)
        time.sleep(0.05)
    return reports + [nodes[rank * len(nodes) // world_size] for rank in sorted(waiting)]


def exchange(launch: Launch, own: dict[str, Any]) -> tuple[dist.TCPStore, dict[str, list[str]]]:
    """All ranks' reports to rank 0, and its verdict (node -> what is wrong) to all of them."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + PORT_SHIFT
    store = dist.TCPStore(address, port, is_master=launch.rank == 0, timeout=PATIENCE, wait_for_workers=False)
    if launch.rank:
        store.set(f"report/{launch.rank}", json.dumps({**own, "time": time.time()}))
        return store, json.loads(store.get("verdict"))
    nodes = os.environ.get("NODE_NAMES", node_name()).split()
    answers = collect(store, own, launch.world_size, nodes)
    reports = [answer for answer in answers if isinstance(answer, dict)]
    verdict = judge(reports, [answer for answer in answers if isinstance(answer, str)])
    describe_speeds(reports)
    store.set("verdict", json.dumps(verdict))
    return store, verdict


def describe_speeds(reports: Sequence[dict[str, Any]]) -> None:
    """Log the devices' speeds, and who is slow."""
    speeds = sorted(report["flops"] for report in reports if report["flops"])
    if not speeds:
        return
    median = speeds[len(speeds) // 2]
    logger.info("pre-flight: %s, matrix products at %.3g FLOP/s (median)", counted(len(reports), "rank"), median)
    for report in reports:
        if report["uuid"] and report["flops"] and report["flops"] < SLOW * median:
            logger.warning(
                "pre-flight: rank %d on %s is slow: %.3g FLOP/s", report["rank"], report["node"], report["flops"]
            )


def sum_over_all(store: dist.TCPStore, launch: Launch) -> None:
    """One sum over all ranks, on the network and with the library that training will use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("sum", store), rank=launch.rank, world_size=launch.world_size, timeout=PATIENCE
    )
    # Whole numbers: a sum of ranks in float32 is no longer exact above 5,793 of them.
    values = torch.full((SUMMED,), launch.rank, dtype=torch.int64, device=device)
    dist.all_reduce(values)
    expected = launch.world_size * (launch.world_size - 1) // 2
    if not bool((values == expected).all()):
        raise ArithmeticError(f"a sum over all ranks is wrong: {values[0].item()}, not {expected}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """The command; its exit status."""
    parser = build_parser(__doc__)
    parser.add_argument("run_folder", type=Path)
    run_folder = parser.parse_args().run_folder
    configure_logging()
    launch = read_launch()
    export_launch(launch)
    torch.set_num_threads(1)
    bad_nodes = run_folder / "slurm" / "bad_nodes"
    if launch.rank == 0:
        bad_nodes.unlink(missing_ok=True)
    store, verdict = exchange(launch, look(launch, run_folder))
    if verdict:
        return refuse(launch, verdict, bad_nodes)
    try:
        sum_over_all(store, launch)
    except (RuntimeError, ArithmeticError) as error:
        logger.error("pre-flight: rank %d on %s: %s", launch.rank, node_name(), str(error).splitlines()[0])
        return 1
    rank_zero("pre-flight passed")
    return 0


def refuse(launch: Launch, verdict: dict[str, list[str]], bad_nodes: Path) -> int:
    """Say what is wrong with which node; the exit status."""
    if launch.rank == 0:
        for node, complaints in verdict.items():
            logger.error("pre-flight: node %s: %s", node, "; ".join(complaints))
        bad_nodes.parent.mkdir(parents=True, exist_ok=True)
        bad_nodes.write_text(" ".join(verdict) + "\n", encoding="utf-8")
        time.sleep(1.0)  # the others read the verdict from this process
    return BAD_NODES


if __name__ == "__main__":
    sys.exit(main())
