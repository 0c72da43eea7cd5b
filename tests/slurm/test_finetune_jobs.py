"""Fine-tuning under a real scheduler: an array over seeds, its last task stopped and requeued, a table at the end."""

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


@pytest.mark.full
def test_an_array_of_seeds_survives_a_signal_and_ends_in_one_table(
    cluster: Cluster, settings: list[str], tmp_path: Path
):
    folder = tmp_path / "runs" / "sst2"
    folder.parent.mkdir()
    array = submit(cluster, folder, settings, "--array=1-2")
    first, second = (task_of(cluster, array, folder, number) for number in (1, 2))
    second.wait_for_step(2)
    second.signal_batch("USR1")  # the last task's number is the array's: only its own start may come to an end
    second.wait_for_text("requeued")
    stopped_at = second.run_file("LATEST")
    for job in (first, second):
        assert job.wait_for_end() == "COMPLETED", job.output
    assert (first.restarts, second.restarts) == (0, 1)
    assert first.output.count("they meet at") == 1
    assert f"checkpoints/{stopped_at}: step" in second.output  # went on from there
    results = [json.loads(job.run_file("results.json")) for job in (first, second)]
    assert [(result["seed"], result["steps"]) for result in results] == [(1, STEPS), (2, STEPS)]
    assert "adversarial_loss" in second.run_file("metrics.jsonl")
    table = subprocess.run(
        [sys.executable, ROOT / "tools" / "table.py", f"{folder}-*"], capture_output=True, text=True, check=True
    ).stdout
    assert "| sst2 | – | accuracy | 2 |" in table

    whole = submit(cluster, tmp_path / "whole", [*settings, "train.seed=2"])
    uninterrupted = Job(cluster.lab, whole, tmp_path / "whole", tmp_path / "whole.out")
    assert uninterrupted.wait_for_end() == "COMPLETED", uninterrupted.output
    assert_same_weights(second, uninterrupted)


# What a job script does with the functions of launch.sh: each task has a step, and the last one kills its own.
STEPS_OF_TWO_TASKS = """#!/bin/bash
. slurm/lib/launch.sh
name_job
srun sleep 600 &
if ((SLURM_ARRAY_TASK_ID == 2)); then
  while (($(squeue --steps --noheader --format=%i | grep -c '[.]0$') < 2)); do sleep 0.2; done
  kill_ranks
fi
wait "$!" || say "the step ended with $?"
"""


def test_the_last_task_of_an_array_kills_its_own_ranks_only(cluster: Cluster, tmp_path: Path):
    options = ["--array=1-2", "--mem=100", "--parsable", f"--output={tmp_path}/%A_%a.out"]
    (tmp_path / "job.sh").write_text(STEPS_OF_TWO_TASKS)
    array = cluster.queue("sbatch", *options, str(tmp_path / "job.sh"))[-1]
    first, second = (task_of(cluster, array, tmp_path / "task", number) for number in (1, 2))
    second.wait_for_text("the step ended with 137")
    second.wait_for_end()
    steps = cluster.lab.run("squeue", "--steps", "--noheader", "--format=%i").stdout.split()
    state, number = first.state, cluster.lab.job(second.number)["JobId"]
    cluster.lab.run("scancel", array)
    assert number == array  # otherwise nothing was tried
    assert state == "RUNNING"
    assert f"{array}_1.0" in steps
    first.wait_for_end()


def test_a_job_queued_from_inside_an_array_is_not_taken_for_that_arrays_task(cluster: Cluster, tmp_path: Path):
    # As sbatch does there: the new job inherits the variables.
    options = ["--array=1-2", "--mem=100", "--parsable", "--output=/dev/null"]
    outer = cluster.queue("sbatch", *options, "--wrap", "sleep 1")[-1]
    inherited = {"SLURM_ARRAY_JOB_ID": outer, "SLURM_ARRAY_TASK_ID": "1"}
    (tmp_path / "job.sh").write_text('#!/bin/bash\n. slurm/lib/launch.sh\nname_job\necho "I am $job"\n')
    options = ["--mem=100", "--parsable", f"--output={tmp_path}/log"]
    inner = cluster.queue("sbatch", *options, str(tmp_path / "job.sh"), **inherited)[-1]
    job = Job(cluster.lab, inner, tmp_path, tmp_path / "log")
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.output == f"I am {inner}\n"
