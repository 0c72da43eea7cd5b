"""Run a function on several ranks inside a test, in a second or two.

Importing torch and deepspeed costs seconds per process, so the ranks are forked from this one, which has them. On a
machine with GPUs a fork may not use them (nor autograd, once this process has), so the ranks are started afresh there.

    from ranks import run_ranks

    def total() -> float:
        value = torch.tensor([float(torch.distributed.get_rank())])
        torch.distributed.all_reduce(value)
        return value.item()

    assert run_ranks(total, 2) == [1.0, 1.0]
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # 5 s in the first deepspeed.initialize of every rank otherwise
import torch

# A forked child hangs in the first parallel region if the pool of threads of its parent is larger than one.
torch.set_num_threads(1)
# DeepSpeed would compile this op with g++ in every init_distributed; only its inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

GRACE_SECONDS = 4.0
"""How long the other ranks may still report after the first error, before they are killed."""


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds every report that came in, the first one first."""


def run_ranks(
    function: Callable[..., object],
    world_size: int,
    *args: object,
    timeout: float = 120.0,
    backend: str | None = "gloo",
) -> list:
    """`function(*args)` on `world_size` ranks with an initialised process group; what each returned, by rank.

    `backend=None` leaves the process group to the function; the environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT) is set in either case. Results travel by pickle, so return tensors on the CPU. Where there are GPUs, or
    with `backend="nccl"`, the function has to be importable (defined at the top of a module).

    Raises RankError, with the failing rank's traceback, when a rank raises, dies or takes more than `timeout` seconds.
    """
    port = free_port()
    processes, connections = [], {}
    try:
        for rank in range(world_size):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = new_process(_rank_main, sender, backend, timeout, function, args)
            with mock.patch.dict(os.environ, rank_environment(rank, world_size, port, backend)):
                process.start()
            sender.close()  # the child holds the only other end, so its death is the end of the stream
            processes.append(process)
            connections[receiver] = rank
        reports = _collect_reports(connections, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return _results(reports, world_size, timeout)


def new_process(target: Callable[..., None], *args: object) -> multiprocessing.Process:
    """A process that is not started yet: forked from this one, or a fresh one where there are GPUs."""
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    return context.Process(target=target, args=args, daemon=True)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int, backend: str | None = "gloo") -> dict[str, str]:
    """The variables a launcher sets for one rank of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cuda" if backend == "nccl" else "cpu",
    }


def _rank_main(sender: Connection, backend: str | None, timeout: float, function: Callable, args: tuple) -> None:
    """The life of one rank: set up, call, report, leave without any clean-up that belongs to the parent."""
    torch.set_num_threads(1)
    gc.freeze()  # what the parent has made is not looked through again by every collection
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's, for torch.distributed
    faulthandler.dump_traceback_later(timeout - 1, file=sys.__stderr__)  # shows where a rank hangs
    try:
        if backend is not None:
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        report = pickle.dumps(("returned", function(*args)))
    except BaseException:
        report = pickle.dumps(("raised", traceback.format_exc()))
    with contextlib.suppress(BrokenPipeError):
        sender.send_bytes(report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _collect_reports(connections: dict[Connection, int], timeout: float) -> dict[int, tuple[str, object]]:
    """Reports by rank in the order they came; stops early some seconds after the first bad one."""
    reports: dict[int, tuple[str, object]] = {}
    waiting = dict(connections)
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), timeout=left):
            report = _receive(connection)
            reports[waiting.pop(connection)] = report
            if report[0] != "returned":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return reports


def _receive(connection: Connection) -> tuple[str, object]:
    """One rank's report, or the fact that it ended without one."""
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return "died", "without a word (killed by a signal, or os._exit)"


def _results(reports: dict[int, tuple[str, object]], world_size: int, timeout: float) -> list:
    """What each rank returned, or the error that tells what happened instead."""
    bad = [f"rank {rank} {status}:\n{text}" for rank, (status, text) in reports.items() if status != "returned"]
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if silent:
        limit = f"{GRACE_SECONDS:g} s after that" if bad else f"{timeout:g} s"
        bad.append(f"no report from rank {', '.join(silent)} within {limit}: killed")
    if bad:
        raise RankError("\n".join(bad))
    return [reports[rank][1] for rank in range(world_size)]
