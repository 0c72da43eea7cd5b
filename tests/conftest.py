"""Fixtures that several folders share, and which tests may run beside each other."""

from __future__ import annotations

import os
import signal

import pytest
from xdist.scheduler import LoadScopeScheduling

# Tests run beside each other and start ranks of their own: threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from small_dataset import small_dataset

__all__ = ["small_dataset"]

# A shell starts what runs in the background with Ctrl-C ignored, which every program that a test starts would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIRST = ("tests/slurm/", "tests/distributed/", "tests/test_readme.py")
"""What takes longest begins, so that no process of pytest is left alone with it at the end."""

ON_GPU = "tests/gpu/"


class ByFixtures(LoadScopeScheduling):
    """Keeps in one process what shares costly fixtures: the tests of a file, and all that use the SLURM lab. Those for
    a GPU share nothing, and wait for programs that start."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ON_GPU):
            return nodeid
        return FIRST[0] if nodeid.startswith(FIRST[0]) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFixtures:
    """How `pytest -n 2` (`make test`) hands out the tests."""
    config.option.loadscopereorder = False  # the order below, not that of how many tests a file has
    return ByFixtures(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: next((i for i, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))
