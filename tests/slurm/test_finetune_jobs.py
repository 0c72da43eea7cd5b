"""Fine-tuning under a real scheduler: an array over seeds, one task of it stopped and requeued, a table at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, Cluster, Job, assert_same_weights
from small_task import finetune_arguments, write_encoder, write_sentences

pytestmark = pytest.mark.timeout(1800)
OPTIONS = ["--nodes=1", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1", "--time=30", "--parsable"]
STEPS = 12


@pytest.fixture(scope="module")
def settings(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every job is given: a small task, a small encoder, SiFT by the script's own preset."""
    folder = tmp_path_factory.mktemp("inputs")
    encoder, data = write_encoder(cluster.dataset, folder / "encoder"), write_sentences(folder / "sentences")
    words = finetune_arguments(encoder, data, Path("unused"), f"train.steps={STEPS}", "checkpoint.interval=1000")
    return [word for word in words[2:] if not word.startswith("run.folder")]


def submit(cluster: Cluster, folder: Path, settings: list[str], *options: str) -> str:
    """Queue the script; the job's number."""
    log = folder.parent / "%A_%a.out" if options else folder.with_suffix(".out")
    command = ["sbatch", *OPTIONS, *options, f"--output={log}", "slurm/finetune_sift.sh", *settings]
    return cluster.queue(*command, f"run.folder={folder}")[-1]


def task_of(cluster: Cluster, array: str, folder: Path, number: int) -> Job:
    """One task of an array."""
    place = folder.with_name(f"{folder.name}-{number}")
    return Job(cluster.lab, f"{array}_{number}", place, folder.parent / f"{array}_{number}.out")


def test_an_array_of_seeds_survives_a_signal_and_ends_in_one_table(
    cluster: Cluster, settings: list[str], tmp_path: Path
):
    folder = tmp_path / "runs" / "sst2"
    folder.parent.mkdir()
    array = submit(cluster, folder, settings, "--array=1-2")
    first, second = (task_of(cluster, array, folder, number) for number in (1, 2))
    first.wait_for_step(2)
    first.signal_batch("USR1")
    first.wait_for_text("requeued")
    stopped_at = first.run_file("LATEST")
    for job in (first, second):
        assert job.wait_for_end() == "COMPLETED", job.output
    assert (first.restarts, second.restarts) == (1, 0)
    assert f"checkpoints/{stopped_at}: step" in first.output  # went on from there
    results = [json.loads(job.run_file("results.json")) for job in (first, second)]
    assert [(result["seed"], result["steps"]) for result in results] == [(1, STEPS), (2, STEPS)]
    assert "adversarial_loss" in first.run_file("metrics.jsonl")
    table = subprocess.run(
        [sys.executable, ROOT / "tools" / "table.py", f"{folder}-*"], capture_output=True, text=True, check=True
    ).stdout
    assert "| sst2 | – | accuracy | 2 |" in table

    whole = submit(cluster, tmp_path / "whole", [*settings, "train.seed=1"])
    uninterrupted = Job(cluster.lab, whole, tmp_path / "whole", tmp_path / "whole.out")
    assert uninterrupted.wait_for_end() == "COMPLETED", uninterrupted.output
    assert_same_weights(first, uninterrupted)
