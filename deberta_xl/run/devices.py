"""What the ranks compute on: its names and versions for people, and why GPUs that are here cannot be used."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.platform import NVIDIA_DRIVER, asks_for_cpu

DRIVER_FILE = Path("/proc/driver/nvidia/version")
OLDEST_DRIVERS = {"13": 580, "12": 525, "11": 450}
"""Major version of the CUDA that torch was built with -> of the oldest NVIDIA driver that it runs on (CUDA's release
notes)."""


def is_on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available() and not asks_for_cpu(os.environ)


def device_name() -> str:
    """This process's device, by the name that its maker gives it."""
    return torch.cuda.get_device_name() if is_on_gpu() else platform.processor() or platform.machine()


def device_versions() -> dict[str, str | None]:
    """What the GPU is driven by; None on a CPU."""
    on_gpu = is_on_gpu()
    return {
        "driver": driver_version() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
    }


def describe_devices(names: Iterable[str], versions: Mapping[str, str | None]) -> str:
    """`8 x NVIDIA H100 80GB HBM3, driver 580.65.06, CUDA 13.0, NCCL 2.29.7`, of all ranks' devices."""
    counts = [f"{count} x {name}" for name, count in Counter(names).items()]
    titles = {"driver": "driver", "cuda": "CUDA", "nccl": "NCCL"}
    return ", ".join([*counts, *(f"{titles[name]} {version}" for name, version in versions.items() if version)])


def driver_version() -> str | None:
    """Of NVIDIA's driver, such as 580.65.06; None where it does not say."""
    try:
        found = re.search(r"\s(\d{3}\.\d+(\.\d+)?)\s", DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found and found[1]


def refuse_unusable_gpus(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a machine whose NVIDIA GPUs torch cannot use: on its CPU a run takes thousands of times as long.

    Raises ConfigError with the reason, unless the environment asks for the CPU.
    """
    if not torch.cuda.is_available() and not asks_for_cpu(environment) and Path(NVIDIA_DRIVER).exists():
        raise ConfigError(
            f"this machine has NVIDIA GPUs, and torch {torch.__version__} can use none of them: {why_unusable()}. To "
            "train on the CPU: DS_ACCELERATOR=cpu ..."
        )


def why_unusable() -> str:
    """What is wrong with the wheel, the driver or the job where no GPU can be used, and what to do."""
    built_for, release = torch.version.cuda, torch.__version__.partition("+")[0]
    if built_for is None:
        kind = "AMD GPUs" if torch.version.hip else "CPUs"
        return f"it is a build for {kind}; PyPI's is for NVIDIA's: pip install --force-reinstall torch=={release}"
    driver, oldest = driver_version(), OLDEST_DRIVERS.get(built_for.partition(".")[0])
    if driver and oldest and int(driver.partition(".")[0]) < oldest:
        return (
            f"the driver is {driver}, and this build's CUDA {built_for} needs {oldest} or newer; update the driver, or "
            "install a build for an older CUDA (docs/install.md)"
        )
    try:
        torch.cuda.init()
        reason = "none is shown to this process"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].strip().rstrip(".")
    return f"{reason} (driver {driver or 'unknown'}, CUDA {built_for}); was the job given any (--gres, --gpus)?"


def refuse_gpu_without_kernels() -> None:
    """Refuse a GPU that is older than all that torch's build has kernels for: its first one would fail in the model.

    Raises ConfigError.
    """
    built = [int(digits) for arch in torch.cuda.get_arch_list() for digits in re.findall(r"^sm_(\d+)$", arch)]
    if not (is_on_gpu() and built):
        return
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < min(built):
        raise ConfigError(
            f"{device_name()} has compute capability {major}.{minor}, and torch {torch.__version__} has kernels from "
            f"{min(built) / 10} on: install a build for an older CUDA (docs/install.md)"
        )
