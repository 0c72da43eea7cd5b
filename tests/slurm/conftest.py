"""A SLURM lab for the whole session. Where it cannot be had, the tests are skipped, and in CI they fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Cluster, Job, make_checkout
from lab import PROGRAMS, Lab, can_isolate, require


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes."""
    require(PROGRAMS)
    folder = tmp_path_factory.mktemp("lab") / "lab"
    with Lab(folder, num_nodes=2, cpus=16, memory_mib=16000, gpus=8, is_isolated=can_isolate()) as running:
        yield running


@pytest.fixture(scope="session")
def cluster(lab, small_dataset, tmp_path_factory) -> Cluster:
    """The lab, the repository and a dataset."""
    return Cluster(lab, make_checkout(tmp_path_factory.mktemp("user") / "checkout"), small_dataset)


@pytest.fixture(scope="session")
def big_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Sixteen nodes that claim to be a GPU cluster's; for questions to the scheduler."""
    require(PROGRAMS)
    folder: Path = tmp_path_factory.mktemp("big") / "lab"
    with Lab(folder, num_nodes=16, cpus=96, memory_mib=2_000_000, gpus=8, is_isolated=False) as running:
        yield running


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nothing happened to."""
    job = cluster.submit(tmp_path_factory.mktemp("runs") / "uninterrupted")
    assert job.wait_for_end() == "COMPLETED", job.output
    return job
