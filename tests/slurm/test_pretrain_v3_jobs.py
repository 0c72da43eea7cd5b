"""Replaced token detection under a real scheduler: two models in one job, stopped, requeued, and none the worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import STEPS, Cluster, Job, assert_same_weights

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
SCRIPT = "slurm/pretrain_v3.sh"
SETTINGS = ["--config", "v3_debug"]


@pytest.fixture(scope="module")
def uninterrupted_v3(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nothing happened to."""
    job = cluster.submit(tmp_path_factory.mktemp("runs") / "v3", *SETTINGS, script=SCRIPT)
    assert job.wait_for_end() == "COMPLETED", job.output
    return job


def test_a_job_trains_both_models_across_nodes(uninterrupted_v3: Job):
    assert uninterrupted_v3.run_file("STATE") == "done"
    assert uninterrupted_v3.last_step() == STEPS
    assert "2 data-parallel x 2 tensor-parallel" in uninterrupted_v3.output
    models = {name.partition(".")[0] for name in uninterrupted_v3.weights()}
    assert models == {"generator", "discriminator"}
    lines = [json.loads(line) for line in uninterrupted_v3.run_file("metrics.jsonl").splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert all(line["generator_loss"] > 0 and line["discriminator_loss"] > 0 for line in trained)
    assert any("valid_discriminator_loss" in line for line in lines)


def test_usr1_saves_requeues_and_both_models_end_as_if_nothing_had_happened(
    cluster: Cluster, uninterrupted_v3: Job, tmp_path: Path
):
    # Nothing but the signal saves.
    job = cluster.submit(tmp_path / "run", *SETTINGS, "checkpoint.interval=1000", script=SCRIPT)
    job.wait_for_step(8)
    job.signal_batch("USR1")
    job.wait_for_text("requeued")
    stopped_at = job.run_file("LATEST")
    assert "step-00000008" <= stopped_at < f"step-{STEPS:08d}"
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.restarts == 1
    assert f"checkpoints/{stopped_at}: step {int(stopped_at[5:])}" in job.output
    assert_same_weights(job, uninterrupted_v3)
