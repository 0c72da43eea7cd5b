"""Known devices, and what a user says of one: which kind, peak operations per second, memory."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig
from deberta_xl.settings.platform import NVIDIA_DRIVER, Device, Platform, asks_for_cpu

#: Dense bf16 peak, FLOP/s, by the whole name that the driver gives, without the maker (vendors' data sheets, without
#: sparsity; the V100's is fp16). A slice of a device (MIG) has a longer name, and is not known.
PEAK_FLOPS = {
    r"H200|H100 \d+GB HBM\w+|GH200 \d+GB.*": 989e12,
    r"H200 NVL|H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100(-SXM4-\d+GB|-PCIE-\d+GB| \d+GB PCIe)": 312e12,
    r"L40S": 362e12,
    r"V100-SXM\d-\d+GB": 125e12,
    r"V100-PCIE-\d+GB": 112e12,
}

DRIVERS = (NVIDIA_DRIVER, "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs show themselves by: NVIDIA's, AMD's, that of Windows."""


def planned_platform(engine: DeepSpeedConfig) -> Platform:
    """What a run's ranks will compute on, wherever that is, as far as it can be told without torch."""
    return Platform(planned_device(engine.precision), engine.weight_bytes)


def planned_device(precision: str) -> Device:
    """DS_ACCELERATOR says it, and is set when training starts; else a GPU that is here does. Where there is none, the
    run is planned for one elsewhere if GPU_MEMORY_GIB is given, or numbers of 16 bits, in which a CPU gains nothing."""
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return "cpu" if chosen == "cpu" else "cuda"
    if not asks_for_cpu(os.environ) and any(Path(driver).exists() for driver in DRIVERS):
        return "cuda"
    return "cuda" if os.environ.get("GPU_MEMORY_GIB") or precision != "fp32" else "cpu"


def peak_flops(device_name: str) -> float | None:
    """The device's bf16 peak, or None when it is not known."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def device_gibibytes() -> float | None:
    """GPU_MEMORY_GIB, None where it is unset or empty. Raises ConfigError."""
    text = os.environ.get("GPU_MEMORY_GIB")
    return read_gibibytes(text) if text else None


def read_gibibytes(text: str) -> float:
    """A device's memory. Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"GPU_MEMORY_GIB={text!r} is not a number of GiB, as in GPU_MEMORY_GIB=80")
    return value
