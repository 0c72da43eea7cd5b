"""Where the ranks of a run meet: MASTER_ADDR, MASTER_PORT and the network that leads there.

Imports no torch: an address that cannot be one is refused before the first expensive second.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import TORCH, Launch, ranks_of_node, whole_number

SLURM_PORTS = range(20000, 30000)
MANY_RANKS = 256
SIOCGIFADDR = 0x8915
"""Linux: ask for the address of an interface."""


def export_launch(launch: Launch, environment: MutableMapping[str, str] = os.environ) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher left them out.

    Complete variables keep DeepSpeed from looking for an MPI. Raises ConfigError like `meeting_point`.
    """
    address, port = meeting_point(launch, environment)
    for key, value in zip(TORCH, launch, strict=True):
        environment[key] = str(value)
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = address, str(port)
    # Gloo listens on what this machine's own name stands for: often loopback, and nothing where names do not resolve.
    if "GLOO_SOCKET_IFNAME" not in environment and (interface := interface_towards(address, port)):
        environment["GLOO_SOCKET_IFNAME"] = interface
    if launch.world_size > MANY_RANKS:
        # Gloo would connect every two ranks at once; so those that exchange something, when they do.
        environment.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def meeting_point(launch: Launch, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port that all ranks meet at. One rank alone meets nobody, whatever MASTER_ADDR is left over.

    Raises ConfigError for an address that does not resolve, a port that is none, and several nodes without an address.
    """
    if launch.world_size == 1 and not has_agent(environment):
        return "127.0.0.1", free_port()
    return find_address(launch, environment), find_port(environment)


def has_agent(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, and not rank 0, listens where the ranks meet."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def find_address(launch: Launch, environment: Mapping[str, str]) -> str:
    """MASTER_ADDR, or this machine where all ranks are on it."""
    address = environment.get("MASTER_ADDR", "").strip()
    if not address:
        has_others = launch.rank != launch.local_rank or ranks_of_node(launch, environment) < launch.world_size
        if environment["SLURM_NNODES"] != "1" if environment.get("SLURM_NNODES") else has_others:
            raise ConfigError(
                "several nodes but no MASTER_ADDR: export the first node's name in the job script (srun, mpirun), or "
                "hand it to every process (mpirun -x MASTER_ADDR=node1 ..., -genv with MPICH)"
            )
        return "127.0.0.1"
    try:
        socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise ConfigError(
            f"MASTER_ADDR={address} is not found by this machine ({reason}); it is the name or address of rank 0's "
            "machine, 127.0.0.1 where all ranks are on this one"
        ) from None
    return address


def find_port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT, or one that all ranks derive from the job's number."""
    port = whole_number("MASTER_PORT", environment)
    if port is None:
        return SLURM_PORTS[(whole_number("SLURM_JOB_ID", environment) or 0) % len(SLURM_PORTS)]
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT={port} is no port; allowed: 1 ... 65535, one that nobody listens on")
    return port


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
