"""The roll call before the process group is made: a start that waits for its peers says for whom, and can be ended.

torch's own meeting waits inside C++, without a word, and without hearing a signal, for half an hour. Here the ranks
find each other first, in steps that Python sees the end of; the process group is then made at the same address.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from deberta_xl.base.errors import ConfigError, PeerError
from deberta_xl.base.launch import Launch, node_name
from deberta_xl.base.log import logger
from deberta_xl.run.rendezvous import has_agent

SAID_EVERY_SECONDS = 30.0
PATIENCE_SECONDS = 1800.0
"""As long as torch would wait."""
CONNECT_SECONDS = 5.0
MOST_FILES = 2**16
SHOWN_RANKS = 10
PREFIX = "roll_call"


class Waiting:
    """How long this rank has waited already, what it says of that, and when it gives up."""

    def __init__(self, launch: Launch, place: str):
        self.launch, self.place = launch, place
        self.began = self.said = time.monotonic()
        # Many ranks ask one store: each the less often, the more they are.
        self.pause = min(1.0, 0.05 + launch.world_size / 5000)

    def until(self, condition: Callable[[], bool], missing: Callable[[], str]) -> None:
        """Poll until the condition holds. Raises PeerError with what is `missing` when patience, or rank 0, ends."""
        try:
            while not condition():
                self.say(missing)
                time.sleep(self.pause)
        except dist.DistError as error:
            raise PeerError(f"rank 0 has ended, or cannot be reached at {self.place} any more") from error

    def say(self, missing: Callable[[], str]) -> None:
        """What is missing, now and then; PeerError when patience ends."""
        now = time.monotonic()
        if now - self.began > PATIENCE_SECONDS:
            raise PeerError(f"{self.describe(now, missing())}: given up")
        if now - self.said > SAID_EVERY_SECONDS:
            self.said = now
            logger.warning("%s. Ctrl-C or `kill %d` ends this rank", self.describe(now, missing()), os.getpid())

    def describe(self, now: float, missing: str) -> str:
        """Who waits, since when, where, and for whom."""
        rank, world_size = self.launch.rank, self.launch.world_size
        return f"rank {rank} of {world_size} has waited {now - self.began:.0f} s at {self.place} for {missing}"


@contextlib.contextmanager
def all_ranks_here(launch: Launch) -> Iterator[None]:
    """Wait until every rank has come to MASTER_ADDR:MASTER_PORT; inside, the process group can be made. Collective.

    Raises ConfigError when a rank comes twice, or counts others than rank 0 does; PeerError when one does not come in
    half an hour.
    """
    if launch.world_size == 1 or dist.is_initialized():
        yield
        return
    allow_open_files()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    waiting = Waiting(launch, f"{address}:{port}")
    store = open_store(launch, address, port, waiting)
    call_roll(dist.PrefixStore(f"{PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), launch, waiting)
    yield  # while the store lives, its port stays open for the process group


def allow_open_files() -> None:
    """Let this process have as many open files as it may ask for: rank 0 has a connection to every other rank, and the
    usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_store(launch: Launch, address: str, port: int, waiting: Waiting) -> dist.TCPStore:
    """The store at the meeting point: opened by rank 0, or by torchrun before it started the ranks."""
    options = {"timeout": timedelta(seconds=PATIENCE_SECONDS), "wait_for_workers": False, "multi_tenant": True}
    if launch.rank == 0 and not has_agent():
        if not is_here(address):
            logger.warning(
                "rank 0 is on %s, and MASTER_ADDR=%s is no address of that machine: if the others do not find it, "
                "export MASTER_ADDR=%s", node_name(), address, node_name(),
            )  # fmt: skip
        try:
            return dist.TCPStore("localhost", port, is_master=True, **options)
        except RuntimeError as error:
            raise ConfigError(
                f"rank 0 cannot listen on port {port} of {node_name()}: {str(error).splitlines()[0]}; another run may "
                "use it: choose another MASTER_PORT (torchrun, deepspeed: --master_port)"
            ) from error
    waiting.until(lambda: answers(address, port), lambda: "rank 0: nobody answers there")
    return dist.TCPStore(address, port, is_master=False, **options)


def is_here(address: str) -> bool:
    """Whether an address is one of this machine's."""
    family, kind, _, _, target = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(target)
        except OSError:
            return False
    return True


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise
        return False
    return True


def call_roll(store: dist.Store, launch: Launch, waiting: Waiting) -> None:
    """Rank 0 waits for all others, and they for its word that all have come."""
    rank, world_size = launch.rank, launch.world_size
    if rank == 0:
        store.set("world_size", str(world_size))
    waiting.until(lambda: store.check(["world_size"]), lambda: "rank 0, which has not come yet")
    if (counted := int(store.get("world_size"))) != world_size:
        raise ConfigError(
            f"rank 0 counts {counted} ranks, rank {rank} on {node_name()} counts {world_size}; mend WORLD_SIZE"
        )
    if store.add(f"rank/{rank}", 1) > 1:
        raise ConfigError(f"two processes say that they are rank {rank} of {world_size}; the later is on {node_name()}")
    store.add("arrived", 1)

    def missing() -> str:
        absent = [other for other in range(world_size) if not store.check([f"rank/{other}"])]
        shown = ", ".join(map(str, absent[:SHOWN_RANKS])) + (", ..." if len(absent) > SHOWN_RANKS else "")
        return f"{len(absent)} of them: {'rank' if len(absent) == 1 else 'ranks'} {shown}"

    if rank == 0:
        waiting.until(lambda: store.add("arrived", 0) >= world_size, missing)
        store.set("complete", "")
    else:
        waiting.until(lambda: store.check(["complete"]), missing)
