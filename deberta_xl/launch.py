"""Which of how many ranks this process is, from whatever started it: deepspeed, torchrun, srun or plain python.

Imports no torch: batch arithmetic is checked before the first expensive second.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from deberta_xl.errors import ConfigError

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_KEYS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
SLURM_PORTS = range(20000, 30000)


class Launch(NamedTuple):
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def is_srun_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script without srun has the counts too, but no numbered step."""
    return all(key in environment for key in SLURM_KEYS) and environment.get("SLURM_STEP_ID", "").isdigit()


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's rank, the number of ranks and the rank within its node.

    Raises ConfigError when the launcher's variables contradict each other.
    """
    if all(key in environment for key in LAUNCHER_KEYS):
        keys = LAUNCHER_KEYS
    elif is_srun_step(environment):
        keys = SLURM_KEYS
    else:
        return Launch()
    values = [environment[key] for key in keys]
    if not all(value.isdigit() for value in values):
        raise ConfigError(f"the launcher's variables are no numbers: {dict(zip(keys, values, strict=True))}")
    rank, world_size, local_rank = map(int, values)
    if not (rank < world_size and local_rank < world_size):
        raise ConfigError(f"the launcher's variables contradict each other: {dict(zip(keys, values, strict=True))}")
    return Launch(rank, world_size, local_rank)


def export_launch(launch: Launch, environment: MutableMapping[str, str] = os.environ) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher left them out.

    Complete variables keep DeepSpeed from looking for an MPI. Raises ConfigError when several nodes have no
    MASTER_ADDR to meet at.
    """
    for key, value in zip(LAUNCHER_KEYS, launch, strict=True):
        environment[key] = str(value)
    if "MASTER_ADDR" not in environment:
        if environment.get("SLURM_NNODES", "1") != "1" and launch.world_size > 1:
            raise ConfigError("several nodes but no MASTER_ADDR: export the first node's name in the job script")
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(default_port(launch, environment))


def default_port(launch: Launch, environment: Mapping[str, str]) -> int:
    """A free port for one rank alone; for several, one that all of them derive from the job's number."""
    if launch.world_size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]
    job = environment.get("SLURM_JOB_ID", "0")
    return SLURM_PORTS[int(job) % len(SLURM_PORTS)]
