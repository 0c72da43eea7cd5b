"""How torch gets memory from a GPU. Said to it before it is imported, whatever launcher has started the process."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SETTING = "PYTORCH_ALLOC_CONF"
OLDER_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ask for segments that grow, unless the user has set anything of the allocator.

    A segment of a fixed size is of use to what fits it alone: tensors whose sizes change leave gaps that nothing fills,
    and near the limit the whole device waits while they are given back.
    """
    if not any(environment.get(name) for name in (SETTING, *OLDER_NAMES)):
        environment[SETTING] = "expandable_segments:True"
