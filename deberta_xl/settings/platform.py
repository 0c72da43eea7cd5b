"""What a run's ranks compute on."""

from __future__ import annotations

from typing import Literal, NamedTuple

Device = Literal["cpu", "cuda"]
"""`cuda` is any GPU that torch calls so."""


class Platform(NamedTuple):
    """A device, and the numbers that are computed with on it."""

    device: Device = "cpu"
    element_bytes: int = 4
    """Of weights and states: 2, 4 or 8."""

    def describe(self) -> str:
        """`a GPU`, `a CPU`."""
        return "a CPU" if self.device == "cpu" else "a GPU"
