"""Which of how many ranks this process is, from whatever started it: deepspeed, torchrun, srun, mpirun or plain python.

One process is one process: the shell that `srun --pty` or `salloc` opens has the counts of its step, too. What half a
launcher has set, or two have set differently, is refused with what to type: taken for one process, each of N would
train alone in the same folder; taken for N, one would wait for ever. Imports no torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from deberta_xl.base.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SPECIAL_STEPS = 0xFFFFFFF0
"""Numbers of slurm's steps from here on are no steps of srun's: the batch script, salloc's interactive shell."""
ONE_PROCESS = "one process is started by: env -u RANK -u WORLD_SIZE -u LOCAL_RANK python ..."
SEVERAL = "several by: torchrun --nproc_per_node N ..., deepspeed --num_gpus N ... or srun python ..."


class Launch(NamedTuple):
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


class Dialect(NamedTuple):
    """The variables by which a kind of launcher tells each process where it stands."""

    rank: str
    world_size: str
    local_rank: str


TORCH = Dialect("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = Dialect("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
MPI = (
    Dialect("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    Dialect("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),  # MVAPICH
    Dialect("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # Hydra: MPICH, Intel MPI
)
UNCOUNTED = ("PMIX_RANK", "PALS_RANKID")
"""Ranks of launchers that do not say of how many."""
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""How many ranks are on this machine, as torchrun, deepspeed and MPI say it."""
NUMBERS_OF_LAUNCHERS = ("GROUP_WORLD_SIZE", "CROSS_SIZE")
"""How many torchruns, or launchers of deepspeed, one on each node, have started the ranks."""


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine, by slurm's name for it where there is one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's rank, the number of ranks and the rank within its node.

    Raises ConfigError when the launcher's variables are incomplete, no numbers, or contradict each other.
    """
    own, outer = read_torch(environment), read_outer(environment)
    if own is not None:
        refuse_contradiction(own, outer, environment)
    elif outer is None:
        refuse_uncounted(environment)
    launch = own or outer or Launch()
    ranks_of_node(launch, environment)
    return launch


def whole_number(name: str, environment: Mapping[str, str]) -> int | None:
    """The value of a variable; None when it is not set, or empty. Raises ConfigError for what is no whole number."""
    value = environment.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise ConfigError(
            f"{name}={value[:40]} is no whole number, as its launcher would set it; unset it: env -u {name} ..."
        )
    return int(value)


def read_torch(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun, deepspeed and Kubernetes' PyTorchJob state; None when they state nothing."""
    rank, world_size = whole_number(TORCH.rank, environment), whole_number(TORCH.world_size, environment)
    if rank is None and world_size in (None, 1):
        return None
    if rank is None or world_size is None:
        there, missing = (TORCH.world_size, TORCH.rank) if rank is None else (TORCH.rank, TORCH.world_size)
        raise ConfigError(
            f"{there}={environment[there]} without {missing} is half a launcher's work: {ONE_PROCESS}; {SEVERAL}"
        )
    return complete(TORCH, rank, world_size, environment)


def complete(dialect: Dialect, rank: int, world_size: int, environment: Mapping[str, str]) -> Launch:
    """The launch with its rank within the node. Raises ConfigError when the numbers contradict each other."""
    local_rank = whole_number(dialect.local_rank, environment)
    if local_rank is None:
        local_rank = derive_local_rank(dialect, rank, world_size, environment)
    if not (rank < world_size and local_rank < world_size):
        raise ConfigError(
            f"the launcher's variables contradict each other: {dialect.rank}={rank}, "
            f"{dialect.world_size}={world_size}, {dialect.local_rank}={local_rank}; ranks count from 0: "
            f"{ONE_PROCESS}; {SEVERAL}"
        )
    return Launch(rank, world_size, local_rank)


def derive_local_rank(dialect: Dialect, rank: int, world_size: int, environment: Mapping[str, str]) -> int:
    """The rank within the node where nobody states it: one rank a node, as a PyTorchJob starts them, or all on this."""
    per_node = environment.get("PET_NPROC_PER_NODE", "1")
    if per_node != "1":
        raise ConfigError(
            f"PET_NPROC_PER_NODE={per_node} asks for several ranks a node, which only torchrun starts: torchrun ..."
        )
    address = environment.get("MASTER_ADDR", "")
    if world_size > 1 and not address:
        raise ConfigError(
            f"{dialect.rank}={rank} and {dialect.world_size}={world_size} without {dialect.local_rank} and MASTER_ADDR "
            f"do not say which ranks share a machine, and where they meet. Set {TORCH.local_rank} and MASTER_ADDR, "
            f"too, or let a launcher do it: {ONE_PROCESS}; {SEVERAL}"
        )
    return rank if address in LOOPBACK else 0


def read_outer(environment: Mapping[str, str]) -> Launch | None:
    """What MPI's launcher, or srun, states; None when neither has started this process."""
    step = read_srun_step(environment)
    mpi = read_mpi(step, environment)
    if mpi is None or step is None:
        return mpi or step
    if mpi.world_size == 1 < step.world_size:
        raise ConfigError(
            f"srun has started {step.world_size} tasks, and MPI's variables count one process; either they are "
            "left over (env -u OMPI_COMM_WORLD_SIZE -u PMI_SIZE ...), or srun lacks --mpi=pmi2 or --mpi=pmix"
        )
    return mpi


def read_mpi(step: Launch | None, environment: Mapping[str, str]) -> Launch | None:
    """What mpirun states: `srun --mpi=pmi2` says the same as its `step`; mpirun itself has a step on each node."""
    for dialect in MPI:
        rank, world_size = whole_number(dialect.rank, environment), whole_number(dialect.world_size, environment)
        if rank is None and world_size is None:
            continue
        if rank is None or world_size is None:
            raise ConfigError(
                f"{dialect.rank} and {dialect.world_size} belong together, and one of them is missing; {ONE_PROCESS}"
            )
        if step and (rank, world_size) == (step.rank, step.world_size):
            return step
        return complete(dialect, rank, world_size, environment)
    return None


def read_srun_step(environment: Mapping[str, str]) -> Launch | None:
    """What srun states: a batch script and an interactive shell have the counts too, but are no tasks of its steps."""
    number = environment.get("SLURM_STEP_ID", "")
    if not (number.isascii() and number.isdigit() and len(number) <= 10 and int(number) < SPECIAL_STEPS):
        return None
    if any(not environment.get(key) for key in SRUN) or is_typed(environment):
        return None
    rank, num_tasks = whole_number(SRUN.rank, environment), whole_number(SRUN.world_size, environment)
    of_step = whole_number("SLURM_STEP_NUM_TASKS", environment)
    return complete(SRUN, rank or 0, num_tasks if of_step is None else of_step, environment)


def is_typed(environment: Mapping[str, str]) -> bool:
    """Whether this command was typed into a shell that `srun --pty` has opened, rather than started by srun.

    Only the first task gets the terminal, and a shell that a person types into gives each command a group of its own.
    """
    if not any(key.startswith("SLURM_PTY_") for key in environment) or environment.get(SRUN.rank) != "0":
        return False
    task = environment.get("SLURM_TASK_PID", "")
    try:
        return os.getpgid(int(task)) != os.getpgid(0)
    except (ValueError, OSError, OverflowError):
        return True


def refuse_contradiction(own: Launch, outer: Launch | None, environment: Mapping[str, str]) -> None:
    """Refuse ranks that are others than srun's or mpirun's, unless a launcher inside of those has given them."""
    if outer is None or outer.world_size == 1 or own[:2] == outer[:2]:
        return
    for key in NUMBERS_OF_LAUNCHERS:
        if (number := whole_number(key, environment)) is not None:
            if number == 1:
                raise ConfigError(
                    f"srun or mpirun has started {outer.world_size} launchers, and each takes itself for the only one "
                    f"({key}=1): {outer.world_size} runs in one folder. Start one on each node, and tell it of the "
                    "others (torchrun --nnodes), or leave it out: srun python ... starts one rank per task"
                )
            return
    raise ConfigError(
        f"RANK={own.rank} of WORLD_SIZE={own.world_size}, but srun or mpirun has started this process as rank "
        f"{outer.rank} of {outer.world_size}: the former are left over, or the same for all; leave them to "
        "the launcher: env -u RANK -u WORLD_SIZE -u LOCAL_RANK srun python ..."
    )


def refuse_uncounted(environment: Mapping[str, str]) -> None:
    """Refuse to be one process where an MPI says that there are others, and not how many."""
    for key in UNCOUNTED:
        if environment.get(key):
            raise ConfigError(
                f"{key}={environment[key]}: an MPI has started this process, and does not say of how many; set RANK, "
                f"WORLD_SIZE, LOCAL_RANK and MASTER_ADDR for each, or start otherwise. One process: env -u {key} "
                f"python ...; {SEVERAL}"
            )


def ranks_of_node(launch: Launch, environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks share this machine, all where nobody says. Raises ConfigError for a number that cannot be."""
    for key in LOCAL_SIZES if launch.world_size > 1 else ():
        if (number := whole_number(key, environment)) is not None:
            if not launch.local_rank < number <= launch.world_size:
                raise ConfigError(
                    f"{key}={number} contradicts rank {launch.rank} of {launch.world_size}, which is rank "
                    f"{launch.local_rank} of its machine; it is left over: env -u {key} ..."
                )
            return number
    return launch.world_size


def device_number(local_rank: int, num_visible: int) -> int:
    """Which of the visible devices is this rank's; a launcher may show each rank its own one only."""
    if num_visible > 1 and local_rank >= num_visible:
        raise ConfigError(
            f"rank {local_rank} of this node has no device: only {num_visible} are visible; start fewer ranks"
        )
    return local_rank if num_visible > 1 else 0
