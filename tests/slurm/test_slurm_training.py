"""Real jobs under a real scheduler: they complete, stop, crash, go on, and stay cancelled."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from jobs import DATA_PARALLEL, ONE_EACH, STEPS, Cluster, Job, assert_same_weights, assert_weights
from started import PRETRAIN, start

from deberta_xl.weights.native import find_weights_folder, read_weights

#: Jobs of two and of four ranks, on two cores that others may use, too.
pytestmark = pytest.mark.timeout(1800)


def test_a_job_trains_across_nodes_to_the_end(uninterrupted: Job):
    assert uninterrupted.run_file("STATE") == "done"
    assert uninterrupted.last_step() == STEPS
    beats = [json.loads(path.read_text()) for path in sorted((uninterrupted.folder / "heartbeat").glob("rank-*.json"))]
    assert [(beat["rank"], beat["host"], beat["phase"]) for beat in beats] == [
        (rank, f"n{rank // 2 + 1}", "done") for rank in range(4)
    ]
    assert "2 data-parallel x 2 tensor-parallel" in uninterrupted.output
    logged = json.loads(uninterrupted.run_file("metrics.jsonl").splitlines()[-2])
    assert 0 < logged["fastest_node_seconds"] <= logged["slowest_node_seconds"]


def test_a_finished_run_ends_at_once_and_says_how_to_go_on(cluster: Cluster, uninterrupted: Job):
    job = cluster.submit(uninterrupted.folder)
    assert job.wait_for_end() == "COMPLETED"
    assert f"{job.folder} is done; to train on" in job.output
    assert "they meet at" not in job.output.split(f"job {job.number}.0")[-1]


def test_usr1_saves_requeues_and_the_result_is_that_of_an_uninterrupted_run(cluster: Cluster, tmp_path: Path):
    whole = start(PRETRAIN, [*cluster.words(tmp_path / "whole"), DATA_PARALLEL], 2, folder=cluster.checkout)
    assert whole.returncode == 0, whole.stdout
    # Nothing but the signal saves.
    job = cluster.submit(tmp_path / "run", DATA_PARALLEL, "checkpoint.interval=1000", options=ONE_EACH)
    job.wait_for_step(8)
    job.signal_batch("USR1")
    job.wait_for_text("requeued")
    stopped_at = job.run_file("LATEST")
    assert stopped_at >= "step-00000008"
    assert stopped_at != "step-00000024"
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.restarts == 1
    assert f"checkpoints/{stopped_at}: step {int(stopped_at[5:])}" in job.output  # resumed from there, not from before
    assert "received USR1: asking the ranks" in job.output, "the log of the first start was overwritten"
    assert_weights(job, read_weights(find_weights_folder(tmp_path / "whole")))


@pytest.mark.full
def test_a_killed_rank_ends_the_step_and_the_job_goes_on_from_its_last_checkpoint(cluster: Cluster, uninterrupted: Job):
    job = cluster.submit(uninterrupted.folder.with_name("killed"))
    job.wait_for_step(7)
    beat = json.loads(job.run_file("heartbeat/rank-00003.json"))
    os.kill(beat["pid"], signal.SIGKILL)
    job.wait_for_text("crash 1 of at most 3")
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.restarts == 1
    assert "resumed from" in job.output
    assert_same_weights(job, uninterrupted)


def test_what_only_the_ranks_can_find_out_is_refused_once(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(tmp_path / "run", DATA_PARALLEL, options=ONE_EACH, DS_ACCELERATOR="quantum")
    assert job.wait_for_end() == "FAILED", job.output
    assert "DS_ACCELERATOR=quantum, but there is cpu" in job.output
    assert "error: another start would end there, too" in job.output
    assert cluster.lab.job(job.number)["ExitCode"] == "2:0"
    assert job.restarts == 0


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(tmp_path / "run", DATA_PARALLEL, options=ONE_EACH)
    job.wait_for_step(2)
    cluster.lab.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED", job.output
    assert job.restarts == 0
    assert "requeued" not in job.output.replace("not requeued", "")
    assert job.run_file("STATE") == "stopped"  # it has saved on its way out
