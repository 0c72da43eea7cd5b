"""All ranks on the host: where they agree and exchange words, so that no device is waited for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deberta_xl.base.launch import whole_number

LEAST_PATIENCE_SECONDS = 3600
"""Also without a watchdog: longer than a save, or a file system that stands still for a while."""

_host_groups: dict[ProcessGroup, ProcessGroup] = {}
"""Of the process group that is the world at the moment; torch's own is a global, too."""


def patience(environment: Mapping[str, str] = os.environ) -> timedelta:
    """How long a rank waits in a collective before the run is ended there, which names nobody.

    Longer than the watchdog (watchdog.py), which names the rank that hangs.
    """
    watched_seconds = whole_number("WATCHDOG_SECONDS", environment) or 0
    return timedelta(seconds=max(LEAST_PATIENCE_SECONDS, 2 * watched_seconds))


def host_group() -> ProcessGroup:
    """The group of all ranks that exchanges through the host. Made when it is asked for first, which is collective."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _host_groups:
        _host_groups.clear()
        # Of all ranks: a gloo group of some would put NCCL's splits of the world out of step.
        _host_groups[world] = dist.new_group(backend="gloo", timeout=patience())
    return _host_groups[world]
