"""Which rank this process is, by whatever launcher."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from deberta_xl.base.errors import ConfigError, PeerError
from deberta_xl.base.launch import Launch, device_number, ranks_of_node, read_launch
from deberta_xl.base.log import configure_logging
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.commands import training_command
from deberta_xl.run import roll_call
from deberta_xl.run.rendezvous import address_of_interface, export_launch, interface_towards, meeting_point

SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123"}


def test_alone_without_a_launcher():
    assert read_launch({}) == Launch(0, 1, 0)


def test_deepspeed_and_torchrun_set_three_variables():
    assert read_launch({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Launch(5, 8, 1)


def test_srun_is_recognised_by_its_step():
    assert read_launch(SRUN) == Launch(3, 4, 1)


def test_a_batch_script_without_srun_is_one_rank_although_slurm_counts_more():
    assert read_launch({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}) == Launch()


STEP = {**SRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
PTY = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "40000", "SLURM_PTY_WIN_COL": "80"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
ONE_PROCESS = {
    "salloc's interactive step": STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "the batch script's own step": STEP | {"SLURM_STEP_ID": "4294967291"},
    "a shell of srun --pty": STEP | PTY,
    "a shell of srun --pty whose task is another process": STEP | PTY | {"SLURM_TASK_PID": "1"},
    "one task of an allocation of eight": STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    "LOCAL_RANK alone": {"LOCAL_RANK": "1"},
    "SLURM_LOCALID alone": {"SLURM_LOCALID": "3"},
    "variables that are there and empty": {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "SLURM_STEP_ID": ""},
    "a world of one": {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    "what a world of one leaves over": {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "two", "MASTER_ADDR": "gone"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
}


@pytest.mark.parametrize("environment", ONE_PROCESS.values(), ids=ONE_PROCESS)
def test_one_process_is_one_process(environment):
    assert read_launch(environment) == Launch()


POD = {"RANK": "1", "WORLD_SIZE": "2"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4"}
RANKS = {
    "a pod of a PyTorchJob": (POD | {"MASTER_ADDR": "job-master-0"}, Launch(1, 2, 0)),
    "ranks that meet on this machine": (POD | {"MASTER_ADDR": "127.0.0.1"}, Launch(1, 2, 1)),
    "Open MPI": (
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Launch(1, 2, 1)
    ),
    "MVAPICH": (
        {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1"}, Launch(3, 4, 1)
    ),
    "Hydra": (HYDRA | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Launch(3, 4, 1)),
    "Hydra, by way of srun": (SRUN | HYDRA | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "MPI_LOCALRANKID": "1"},
                              Launch(3, 4, 1)),
    "srun --mpi=pmi2": (SRUN | HYDRA, Launch(3, 4, 1)),
    "torchrun on each node, by srun": (
        SRUN | TORCHRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "GROUP_WORLD_SIZE": "2"}, Launch(3, 4, 1)
    ),
    "RANK exported from SLURM_PROCID": (SRUN | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch(3, 4, 1)),
    "srun --pty of the command itself": (STEP | PTY | {"SLURM_TASK_PID": str(os.getpid())}, Launch(0, 8, 0)),
    "another task of srun --pty": (STEP | PTY | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, Launch(1, 8, 1)),
}  # fmt: skip


@pytest.mark.parametrize(("environment", "launch"), RANKS.values(), ids=RANKS)
def test_the_ranks_of_every_launcher_are_known(environment, launch):
    assert read_launch(environment) == launch


REFUSED = {
    "half a launcher": (POD, "without LOCAL_RANK and MASTER_ADDR .* torchrun"),
    "RANK without WORLD_SIZE": ({"RANK": "0"}, "RANK=0 without WORLD_SIZE .* env -u RANK"),
    "WORLD_SIZE without RANK": ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 without RANK"),
    "no ranks": ({"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "contradict"),
    "a rank beyond the last": ({"RANK": "8", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK=8, WORLD_SIZE=8"),
    "a local rank beyond the last": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "9"}, "LOCAL_RANK=9"),
    "no number": ({"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK=x is no whole number"),
    "a digit that is no number": ({"RANK": "²", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK=² is no whole number"),
    "a number of 5,000 digits": ({"RANK": "1" * 5000, "WORLD_SIZE": "8"}, "is no whole number"),
    "local sizes of another run": (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 contradicts rank 3 of 4"),
    "local sizes in words": (TORCHRUN | {"LOCAL_SIZE": "two"}, "LOCAL_SIZE=two is no whole number"),
    "an MPI that does not count": ({"PMIX_RANK": "1"}, "PMIX_RANK=1: an MPI has started this process"),
    "half an MPI": ({"PMI_RANK": "1"}, "PMI_RANK and PMI_SIZE belong together"),
    "MPI that knows one of srun's eight": (STEP | {"PMI_RANK": "0", "PMI_SIZE": "1"}, "8 tasks, .* one process"),
    "a torchrun in each of eight tasks": (STEP | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "8 runs in one folder"),
    "ranks of another shell in srun's": (
        SRUN | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK=0 .* as rank 3 of 4"
    ),
    "several ranks a pod without torchrun": (POD | {"MASTER_ADDR": "m", "PET_NPROC_PER_NODE": "8"}, "torchrun"),
}  # fmt: skip


@pytest.mark.parametrize(("environment", "words"), REFUSED.values(), ids=REFUSED)
def test_half_a_launcher_is_refused_with_what_to_type(environment, words):
    with pytest.raises(ConfigError, match=words):
        read_launch(environment)


def test_a_refusal_is_said_whatever_rank_is_left_over(monkeypatch, capsys):
    configure_logging()
    for environment in (
        {"LOCAL_RANK": "1"},
        {"SLURM_LOCALID": "3"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "9"},
    ):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        training_command.complain_once_per_node(ConfigError("no such file"))
        assert "no such file" in capsys.readouterr().err
        for key in environment:
            monkeypatch.delenv(key)


def test_a_rank_takes_its_own_device_or_the_only_one_it_sees():
    assert [device_number(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]
    assert device_number(3, 1) == 0
    with pytest.raises(ConfigError, match="rank 2 of this node has no device: only 2 are visible"):
        device_number(2, 2)


def test_what_the_launcher_left_out_is_filled_in():
    environment = dict(SRUN, SLURM_NNODES="1")
    export_launch(read_launch(environment), environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["MASTER_PORT"] == "20123"


def test_what_the_launcher_said_is_kept():
    environment = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "5"}
    export_launch(Launch(1, 2, 1), environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.2", "5")


@pytest.mark.parametrize(
    ("left_over", "words"),
    [
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x is no whole number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"SLURM_JOB_ID": "abc"}, "SLURM_JOB_ID=abc is no whole number"),
        ({"MASTER_ADDR": "no.such.name.invalid"}, "MASTER_ADDR=no.such.name.invalid is not found"),
        ({"MASTER_ADDR": "a" * 300}, "is not found"),
    ],
)
def test_a_meeting_point_that_is_none_is_refused_and_one_process_meets_nobody(left_over, words):
    with pytest.raises(ConfigError, match=words):
        meeting_point(Launch(0, 2, 0), left_over)
    address, port = meeting_point(Launch(), left_over)
    assert address == "127.0.0.1"
    assert port > 1023


def test_an_empty_meeting_point_is_none():
    assert meeting_point(Launch(1, 2, 1), {"MASTER_ADDR": "", "MASTER_PORT": ""}) == ("127.0.0.1", 20000)


def test_ranks_share_the_cores_of_their_own_machine():
    assert ranks_of_node(Launch(3, 8, 3), {"LOCAL_WORLD_SIZE": "4"}) == 4
    assert ranks_of_node(Launch(3, 8, 3), {}) == 8


def start_waiting(store, rank: int, world_size: int = 2) -> threading.Thread:
    """A rank in the roll call."""
    launch = Launch(rank, world_size, rank)
    waiting = roll_call.Waiting(launch, "node1:29500")
    thread = threading.Thread(target=roll_call.call_roll, args=(store, launch, waiting), daemon=True)
    thread.start()
    return thread


def test_a_start_that_waits_says_for_whom_and_how_to_end_it(monkeypatch, caplog):
    monkeypatch.setattr(roll_call, "SAID_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(roll_call.logger, "propagate", True)
    store = dist.HashStore()

    def said(rank: int) -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        return [text for text in texts if f"rank {rank} of 3 has waited" in text and "for 1 of them: rank 1" in text]

    with caplog.at_level(logging.WARNING):
        threads = [start_waiting(store, rank, 3) for rank in (0, 2)]
        deadline = time.monotonic() + 20
        while not (said(0) and said(2)) and time.monotonic() < deadline:
            time.sleep(0.02)
        threads.append(start_waiting(store, 1, 3))
        for thread in threads:
            thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    for rank in (0, 2):
        assert f"s at node1:29500 for 1 of them: rank 1. Ctrl-C or `kill {os.getpid()}` ends this rank" in said(rank)[0]


def test_a_rank_that_counts_otherwise_or_comes_twice_is_refused():
    store = dist.HashStore()
    for thread in (start_waiting(store, 0), start_waiting(store, 1)):
        thread.join(10)
    with pytest.raises(ConfigError, match=r"rank 0 counts 2 ranks, rank 1 .* counts 4"):
        roll_call.call_roll(store, Launch(1, 4, 1), roll_call.Waiting(Launch(1, 4, 1), ""))
    with pytest.raises(ConfigError, match="two processes say that they are rank 1"):
        roll_call.call_roll(store, Launch(1, 2, 1), roll_call.Waiting(Launch(1, 2, 1), ""))


def test_a_rank_whose_rank_zero_has_gone_says_so(monkeypatch):
    def ask() -> bool:
        raise dist.DistNetworkError("Failed to recv")

    with pytest.raises(PeerError, match="rank 0 has ended, or cannot be reached at node1:29500"):
        roll_call.Waiting(Launch(1, 2, 1), "node1:29500").until(ask, lambda: "rank 0")
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", -1)
    with pytest.raises(PeerError, match=r"rank 1 of 2 has waited 0 s at node1:29500 for rank 0: given up"):
        roll_call.Waiting(Launch(1, 2, 1), "node1:29500").until(lambda: False, lambda: "rank 0")


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}.*MASTER_PORT"):
            roll_call.open_store(Launch(0, 2, 0), "127.0.0.1", port, roll_call.Waiting(Launch(0, 2, 0), ""))


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "quantum")
    with pytest.raises(ConfigError, match=r"DS_ACCELERATOR=quantum, but there is cpu.* here"):
        training_command.choose_accelerator()


def status_after(number: signal.Signals, *, is_training: bool, is_taken: bool = False) -> int:
    """How a process ends that gets a signal before or after training has begun; 0 where it goes on. `is_taken` has a
    library set its own handler, of which Python knows nothing, before a step begins."""
    child = os.fork()
    if not child:
        stop = StopRequest()
        if is_training:
            stop.training_begins()
        if is_taken:
            ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(1))  # SIG_IGN
            stop.listen()
        os.kill(os.getpid(), number)
        os._exit(0 if stop.signal == number else 99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_term_ends_a_start_at_once_and_training_at_its_next_step(monkeypatch):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert status_after(signal.SIGTERM, is_training=False) == 143
    assert status_after(signal.SIGTERM, is_training=True) == 0
    assert status_after(signal.SIGUSR1, is_training=False) == 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        assert status_after(number, is_training=True, is_taken=True) == 0
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert 0 < status_after(signal.SIGTERM, is_training=False) < training_command.REFUSED


def test_several_nodes_need_an_address_to_meet_at():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        export_launch(Launch(3, 4, 1), dict(SRUN, SLURM_NNODES="2"))


def test_gloo_is_told_the_interface_that_leads_to_the_first_node():
    assert interface_towards("127.0.0.1", 5) is None  # this machine alone: gloo's own choice is right
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    with socket.socket() as probe:
        addresses = {name: address for name in names if (address := address_of_interface(probe, name))}
    for name, address in addresses.items():
        assert interface_towards(address, 5) in (None, name)
    environment = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "5", "GLOO_SOCKET_IFNAME": "ib0"}
    export_launch(Launch(1, 2, 1), environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert interface_towards("no.such.name.invalid", 5) is None


def test_thousands_of_ranks_connect_when_they_exchange_something_and_may_have_the_files_for_it(monkeypatch):
    for world_size, is_lazy in ((8, False), (4096, True)):
        environment = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "5"}
        export_launch(Launch(1, world_size, 1), environment)
        assert ("TORCH_GLOO_LAZY_INIT" in environment) is is_lazy
    infinite = resource.RLIM_INFINITY
    for limits, most in (((1024, 4096), 4096), ((1024, infinite), 2**16), ((infinite, infinite), None)):
        asked = []
        monkeypatch.setattr(roll_call.resource, "getrlimit", lambda kind, limits=limits: limits)
        monkeypatch.setattr(roll_call.resource, "setrlimit", lambda kind, limits, asked=asked: asked.append(limits))
        roll_call.allow_open_files()
        assert asked == ([] if most is None else [(most, limits[1])])
