"""Which of how many ranks this process is, from whatever started it: deepspeed, torchrun, srun or plain python.

Imports no torch: batch arithmetic is checked before the first expensive second.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from deberta_xl.errors import ConfigError

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_KEYS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
SLURM_PORTS = range(20000, 30000)
SIOCGIFADDR = 0x8915
"""Linux: ask for the address of an interface."""


class Launch(NamedTuple):
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine, by slurm's name for it where there is one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


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


def device_number(local_rank: int, num_visible: int) -> int:
    """Which of the visible devices is this rank's; a launcher may show each rank its own one only."""
    if num_visible > 1 and local_rank >= num_visible:
        raise ConfigError(
            f"rank {local_rank} of this node has no device: only {num_visible} are visible; start fewer ranks"
        )
    return local_rank if num_visible > 1 else 0


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
    # Gloo listens on what this machine's own name stands for: often loopback, and nothing where names do not resolve.
    if "GLOO_SOCKET_IFNAME" not in environment and (
        interface := interface_towards(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    ):
        environment["GLOO_SOCKET_IFNAME"] = interface


def interface_towards(host: str, port: int) -> str | None:
    """The network interface that leads to `host`; None when there is none, or when it is this machine's loopback."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: the system chooses a route
            own = probe.getsockname()[0]
            named = {name: address_of_interface(probe, name) for _, name in socket.if_nameindex()}
    except OSError:
        return None
    return next((name for name, address in named.items() if address == own and name != "lo"), None)


def address_of_interface(probe: socket.socket, name: str) -> str | None:
    """The IPv4 address of a network interface, None when it has none."""
    request = struct.pack("256s", name.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    except OSError:
        return None


def default_port(launch: Launch, environment: Mapping[str, str]) -> int:
    """A free port for one rank alone; for several, one that all of them derive from the job's number."""
    if launch.world_size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]
    job = environment.get("SLURM_JOB_ID", "0")
    return SLURM_PORTS[int(job) % len(SLURM_PORTS)]
