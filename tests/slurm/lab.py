"""A real SLURM on this machine: munged, slurmctld and one slurmd per pretended node, all below one folder.

Isolated (needs root): the controller and every node have a network, host name and mounts of their own, joined by a
bridge that only they see, so that what works on one machine by accident (127.0.0.1 as everybody's address, a folder
that is on one node only) fails as it does on a cluster. Otherwise all daemons share this machine's loopback device.

Daemons run in the foreground as children of the tests and die with them; nothing outside the folder is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
SUBNET = "10.213.7"
CONTROLLER = "login"
PR_SET_PDEATHSIG = 1
#: Generous: a loaded machine is slow, and nothing is gained by giving up early.
SECONDS = 300.0

Result = TypeVar("Result")

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={controller}({controller_address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
{communication}
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Nodes may claim more cores and memory than this machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=15
MinJobAge=3600
MaxTasksPerNode=128
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""


def require(programs: Mapping[str, str]) -> None:
    """Skip the test, or fail it in CI, where programs (-> their Debian package) are absent and cannot be installed."""
    if missing := install(programs):
        reason = f"not installed here: apt-get install --no-install-recommends {' '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def install(programs: Mapping[str, str]) -> list[str]:
    """Install absent Debian packages (program -> package), if this user may; those that are missing still."""
    if (packages := absent_packages(programs)) and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, check=False)
    return absent_packages(programs)


def absent_packages(programs: Mapping[str, str]) -> list[str]:
    """Packages whose program is not on the path."""
    return sorted({package for program, package in programs.items() if find(program) is None})


def find(program: str) -> str | None:
    """Where a program is; daemons live in /usr/sbin, which is not on everybody's path."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def die_with_tests() -> None:
    """In a new child: be killed when the process that runs the tests ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Host:
    """A pretended machine: namespaces for network, host name and mounts, held open by a sleeping process."""

    def __init__(self, name: str, hosts_file: Path):
        self.name = name
        script = (
            'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && echo ready && exec sleep infinity'
        )
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "bash", "-c", script, "_", name, str(hosts_file)],
            stdout=subprocess.PIPE, text=True, preexec_fn=die_with_tests,
        )  # fmt: skip
        if self.holder.stdout.readline() != "ready\n":
            raise PermissionError(f"no namespaces for {name}")

    def prefix(self, folder: Path = Path("/")) -> list[str]:
        """What to put before a command that is to run there, in `folder`."""
        return ["nsenter", "--target", str(self.holder.pid), "--net", "--mount", "--uts", f"--wd={folder}", "--"]

    def run(self, *command: str) -> None:
        """Run a command there."""
        subprocess.run([*self.prefix(), *command], check=True, capture_output=True)

    def close(self) -> None:
        """Let go of the namespaces."""
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()


def can_isolate() -> bool:
    """Whether namespaces can be made here."""
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    probe = "mount --bind /etc/hosts /etc/hosts && ip link add probe type bridge"
    command = ["unshare", "--net", "--mount", "--uts", "bash", "-c", probe]
    return subprocess.run(command, capture_output=True).returncode == 0


class Lab:
    """A cluster of `num_nodes` nodes n1 … that claim `cpus`, `memory_mib` and `gpus` each. Use as a context."""

    def __init__(self, folder: Path, *, num_nodes: int, cpus: int, memory_mib: int, gpus: int, is_isolated: bool):
        self.folder, self.is_isolated = folder, is_isolated
        self.names = [f"n{number + 1}" for number in range(num_nodes)]
        self.cpus, self.memory_mib, self.gpus = cpus, memory_mib, gpus
        self.hosts: dict[str, Host] = {}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.configuration = folder / "slurm.conf"

    def __enter__(self) -> Lab:
        try:
            self.prepare_folder()
            if self.is_isolated:
                self.join_hosts()
            self.write_configuration()
            self.start("munged", CONTROLLER, "munged", "--foreground", "--force", *self.munge_options())
            wait_for(self.is_munge_up, "munged's socket")
            self.start("slurmctld", CONTROLLER, "slurmctld", "-D", "-c", "-f", str(self.configuration))
            for name in self.names:
                self.start_node(name)
            wait_for(self.is_idle, f"{len(self.names)} idle nodes; logs in {self.folder}/log")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """End every job and daemon of the lab."""
        if "slurmctld" in self.daemons:
            self.cancel_all()
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self.kill_leftovers()
        for host in self.hosts.values():
            host.close()

    def prepare_folder(self) -> None:
        """Folders, munge's key, and devices that stand for GPUs."""
        for name in ("controller", "log", "munge", "devices", *(f"spool.{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for number in range(self.gpus):
            device = self.folder / "devices" / f"gpu{number}"
            if os.geteuid() == 0:
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))  # a twin of /dev/null: slurmd wants a device
            else:
                device.touch()

    def munge_options(self) -> list[str]:
        """Where munged keeps its files."""
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge/{name}" for option, name in paths.items()]

    def is_munge_up(self) -> bool:
        """Whether munged listens."""
        self.check_daemons()
        return (self.folder / "munge" / "socket").exists()

    def check_daemons(self) -> None:
        """Fail with a daemon's last words when one has ended."""
        for key, daemon in self.daemons.items():
            words = (self.folder / "log" / f"{key}.out").read_text(errors="replace")[-1000:]
            assert daemon.poll() is None, f"{key} has ended with status {daemon.returncode}:\n{words}"

    def join_hosts(self) -> None:
        """Make the namespaces and the bridge between them, which lives in the controller's."""
        addresses = {CONTROLLER: f"{SUBNET}.254"}
        addresses |= {name: f"{SUBNET}.{number + 1}" for number, name in enumerate(self.names)}
        hosts_file = self.folder / "hosts"
        hosts_file.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        self.hosts = {name: Host(name, hosts_file) for name in addresses}
        controller = self.hosts[CONTROLLER]
        controller.run("ip", "link", "add", "bridge", "type", "bridge")
        controller.run("ip", "addr", "add", f"{addresses[CONTROLLER]}/24", "dev", "bridge")
        controller.run("ip", "link", "set", "bridge", "up")
        for name in self.names:
            node = self.hosts[name]
            pair = ["type", "veth", "peer", "name", "eth0", "netns", str(node.holder.pid)]
            controller.run("ip", "link", "add", f"to-{name}", *pair)
            controller.run("ip", "link", "set", f"to-{name}", "master", "bridge", "up")
            node.run("ip", "addr", "add", f"{addresses[name]}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")

    def write_configuration(self) -> None:
        """slurm.conf and gres.conf."""
        port, *node_ports = free_ports(1 + len(self.names))
        here = socket.gethostname().split(".")[0]
        nodes = []
        for number, name in enumerate(self.names):
            host, address = (name, f"{SUBNET}.{number + 1}") if self.is_isolated else (here, "127.0.0.1")
            nodes.append(
                f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={node_ports[number]} "
                f"CPUs={self.cpus} RealMemory={self.memory_mib} Gres=gpu:{self.gpus} State=UNKNOWN"
            )
        text = CONFIGURATION.format(
            controller=CONTROLLER if self.is_isolated else here,
            controller_address=f"{SUBNET}.254" if self.is_isolated else "127.0.0.1",
            communication="" if self.is_isolated else "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
            port=port,
            user=psutil.Process().username(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        self.configuration.write_text(text)
        devices = f"{self.folder}/devices/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{len(self.names)}] Name=gpu File={devices}\n")

    def environment(self, **extra: str) -> dict[str, str]:
        """A user's environment on the login node: none of the tests' own SLURM or launcher variables."""
        launcher = ("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
        return {**kept, "SLURM_CONF": str(self.configuration), **extra}

    def prefix(self, name: str, folder: Path = Path("/")) -> list[str]:
        """What to put before a command that is to run on a host, in `folder`."""
        return self.hosts[name].prefix(folder) if self.is_isolated else []

    def start(self, key: str, host: str, program: str, *arguments: str) -> None:
        """Start a daemon on a host."""
        log = (self.folder / "log" / f"{key}.out").open("ab")
        with log:
            self.daemons[key] = subprocess.Popen(
                [*self.prefix(host), find(program), *arguments],
                env=self.environment(), stdout=log, stderr=log, cwd="/", preexec_fn=die_with_tests,
            )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self.start(f"slurmd.{name}", name, "slurmd", "-D", "-c", "-N", name, "-f", str(self.configuration))

    def lose_node(self, name: str) -> None:
        """Let a node be lost: its slurmd and its network are gone at once, its jobs' processes go on."""
        self.hosts[name].run("ip", "link", "set", "eth0", "down")
        daemon = self.daemons.pop(f"slurmd.{name}")
        daemon.kill()
        daemon.wait()

    def find_node(self, name: str) -> None:
        """Let a lost node come back."""
        self.hosts[name].run("ip", "link", "set", "eth0", "up")
        self.start_node(name)

    def run(
        self, *command: str, cwd: Path = Path("/"), extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node; output and errors in one text."""
        return subprocess.run(
            [*self.prefix(CONTROLLER, cwd), *command], cwd=cwd, env=self.environment(**(extra or {})),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS,
        )  # fmt: skip

    def is_idle(self) -> bool:
        """Whether all nodes are up and free."""
        self.check_daemons()
        return self.node_states() == {"idle"}

    def node_states(self) -> set[str]:
        """The nodes' states, e.g. {"idle"}; empty while the controller does not answer."""
        answer = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T")
        lines = answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []
        return {line.split()[1] for line in lines} if len(lines) == len(self.names) else set()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by its names; empty when the job is not known."""
        text = self.run("scontrol", "show", "job", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text)) if "JobId=" in text else {}

    def cancel_all(self) -> None:
        """Cancel every job, and wait until none is left."""
        for options in (["--state=PENDING"], ["--full", "--signal=KILL"], []):
            self.run("scancel", *options, "--user", psutil.Process().username())
        deadline = time.monotonic() + 60
        while self.run("squeue", "-h", "-o", "%i").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def processes(self, script: str) -> list[psutil.Process]:
        """Processes of this lab's jobs whose command line names `script`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("SLURM_CONF") == str(self.configuration)
                if is_ours and any(word.endswith(script) for word in process.cmdline()):
                    found.append(process)
        return found

    def kill_leftovers(self) -> None:
        """Kill what jobs or lost nodes have left running."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.configuration) and process.pid != os.getpid():
                    process.kill()


def wait_for(condition: Callable[[], Result], what: str, seconds: float = SECONDS) -> Result:
    """Poll until `condition()` is true; what it returned. AssertionError with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.2)
    return result
