"""What a run's ranks compute on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Device = Literal["cpu", "cuda"]
"""`cuda` is any GPU that torch calls so."""

NVIDIA_DRIVER = "/dev/nvidiactl"
"""What NVIDIA's driver shows itself by."""


def asks_for_cpu(environment: Mapping[str, str]) -> bool:
    """Whether GPUs, where there are any, are to be left alone: DS_ACCELERATOR says so, or they are hidden."""
    return environment.get("DS_ACCELERATOR") == "cpu" or environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


class Platform(NamedTuple):
    """A device, and the numbers that are computed with on it."""

    device: Device = "cpu"
    element_bytes: int = 4
    """Of weights and states: 2, 4 or 8."""

    def describe(self) -> str:
        """`a GPU`, `a CPU`."""
        return "a CPU" if self.device == "cpu" else "a GPU"
