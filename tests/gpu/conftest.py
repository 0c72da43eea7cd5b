"""What stands in this folder needs an NVIDIA GPU: it is marked so, and skipped where torch finds none."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nobody can forget the mark."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with a reason."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use; `make gpu` runs it there")
