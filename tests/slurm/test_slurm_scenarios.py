"""What happens to long jobs on real clusters: preempted, nodes lost, ranks hung, disks full. Minutes: marked `full`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import OPTIONS, SCRIPT, SETTINGS, Cluster, Job, assert_same_weights
from lab import Lab, wait_for

from deberta_xl.checkpoint.folders import verify_checkpoint
from deberta_xl.checkpoint.manifest import step_folders

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
#: Long enough for ranks to start on a loaded machine, where nothing moves either.
WATCHDOG_SECONDS = 90


def assert_whole(job: Job) -> None:
    """Every checkpoint of a run is as its manifest says, and no save was left unfinished."""
    folders = step_folders(job.folder / "checkpoints")
    assert folders
    for folder in folders:
        verify_checkpoint(folder, collective=False)


def process_of(job: Job, rank: int) -> int:
    """A rank's process."""
    return json.loads(job.run_file(f"heartbeat/rank-{rank:05d}.json"))["pid"]


def test_a_preempted_job_saves_and_comes_back(cluster: Cluster, uninterrupted: Job, tmp_path: Path):
    job = cluster.submit(tmp_path / "run", "checkpoint.interval=1000")  # nothing but the preemption saves
    job.wait_for_step(8)
    options = ["--partition=urgent", "--nodes=2", "--exclusive", "--time=5", "--output=/dev/null", "--parsable"]
    (urgent,) = cluster.queue("sbatch", *options, "--wrap", "sleep 5")
    job.wait_for_text("requeued")
    saved = job.run_file("LATEST")
    assert "step-00000008" <= saved < "step-00000024"
    assert job.wait_for_end() == "COMPLETED", job.output
    assert cluster.lab.job(urgent)["JobState"] == "COMPLETED"
    assert job.restarts == 1
    assert f"checkpoints/{saved}: step" in job.output
    assert_same_weights(job, uninterrupted)


@pytest.mark.parametrize("node", ["n1", "n2"])  # the first one has the batch shell, too, which lives on
def test_a_lost_node_costs_what_was_done_since_the_last_checkpoint_only(
    cluster: Cluster, uninterrupted: Job, tmp_path: Path, node: str
):
    if not cluster.lab.is_isolated:
        pytest.skip("nodes share their network here: no namespaces without root")
    job = cluster.submit(tmp_path / "run")
    job.wait_for_step(7)
    cluster.lab.lose_node(node)
    wait_for(lambda: job.restarts == 1, "the requeue after a node failure")
    cluster.lab.find_node(node)
    assert job.wait_for_end() == "COMPLETED", job.output
    assert "resumed from" in job.output
    assert_whole(job)
    assert_same_weights(job, uninterrupted)


def test_a_hung_rank_is_named_and_the_job_goes_on(cluster: Cluster, uninterrupted: Job, tmp_path: Path):
    job = cluster.submit(tmp_path / "run", WATCHDOG_SECONDS=str(WATCHDOG_SECONDS))
    job.wait_for_step(7)
    os.kill(process_of(job, 2), signal.SIGSTOP)
    job.wait_for_text("crash 1 of at most 3")
    assert re.search(
        r"watchdog: nothing has moved for \d+ s: rank 2 on n2 \(step \d+, [a-z-]+\): no sign of life", job.output
    )
    assert job.wait_for_end() == "COMPLETED", job.output
    assert_same_weights(job, uninterrupted)


def test_crashes_without_a_new_checkpoint_come_to_an_end(cluster: Cluster, tmp_path: Path):
    # Nothing is ever saved, and rank 3 dies as soon as it trains.
    job = cluster.submit(tmp_path / "run", "checkpoint.interval=1000", MAX_CRASHES="2")
    for crash in (1, 2):
        job.wait_for_step(1)
        os.kill(process_of(job, 3), signal.SIGKILL)
        job.wait_for_text(f"crash {crash} of at most 2")
        (job.folder / "metrics.jsonl").unlink()
    assert job.wait_for_end() == "FAILED", job.output
    assert "giving up; mend what the ranks said above" in job.output
    assert job.restarts == 1


def test_the_jobs_of_a_chain_continue_each_other(cluster: Cluster, uninterrupted: Job, tmp_path: Path):
    folder = tmp_path / "run"
    options = [*[option for option in OPTIONS if option != "--parsable"], f"--output={tmp_path}/%j.out"]
    data = [f"data.train={cluster.dataset.train}", f"data.valid={cluster.dataset.valid}", f"run.folder={folder}"]
    numbers = cluster.queue("bash", "slurm/submit.sh", "--chain", "3", *options, SCRIPT, *SETTINGS, *data)
    first, second, third = (Job(cluster.lab, number, folder, tmp_path / f"{number}.out") for number in numbers)
    first.wait_for_step(8)
    assert second.state == "PENDING"
    first.signal_batch("USR1")
    assert [job.wait_for_end() for job in (first, second, third)] == ["COMPLETED"] * 3, second.output
    assert "not requeued: the job was submitted without --requeue" in first.output
    assert "resumed from" in second.output
    assert "is done; to train on" in third.output
    assert_same_weights(second, uninterrupted)


def test_a_bad_node_is_named_by_the_preflight_and_left_out(cluster: Cluster, tmp_path: Path):
    if not cluster.lab.is_isolated:
        pytest.skip("nodes share their memory here: no namespaces without root")
    node = cluster.lab.hosts["n2"]
    node.run("mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    try:
        job = cluster.submit(tmp_path / "run")
        job.wait_for_text("from now on without n2")
    finally:
        node.run("umount", "/dev/shm")
    assert "pre-flight: node n2: /dev/shm has 1 MiB free; needed: 64" in job.output
    assert cluster.lab.job(job.number)["ExcNodeList"] == "n2"
    assert "step 1/" not in job.output
    cluster.lab.run("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of little more than a GiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here without root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_job_and_the_checkpoint_before_is_whole(
    cluster: Cluster, uninterrupted: Job, small_disk: Path, tmp_path: Path
):
    # On nodes that share this machine's files; their names stand for no address here.
    with Lab(tmp_path / "lab", num_nodes=2, cpus=16, memory_mib=16000, gpus=8, is_isolated=False) as lab:
        there = cluster._replace(lab=lab)
        job = there.submit(small_disk / "run", options=[f"--output={tmp_path}/log"])._replace(log=tmp_path / "log")
        job.wait_for_step(1)
        fill(small_disk / "filler", room=bytes_in(step_folders(uninterrupted.folder / "checkpoints")[0]) * 3 // 2)
        assert job.wait_for_end() == "FAILED", job.output
        assert "No space left on device" in job.output
        assert "resumed from" not in job.output
        assert_whole(job)
        (small_disk / "filler").unlink()
        job = there.submit(small_disk / "run", options=[f"--output={tmp_path}/log"])._replace(log=tmp_path / "log")
        assert job.wait_for_end() == "COMPLETED", job.output
        assert "resumed from" in job.output
        assert "they meet at 127.0.0.1:" in job.output
        assert_same_weights(job, uninterrupted)


def bytes_in(folder: Path) -> int:
    """What its files take."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def fill(file: Path, room: int) -> None:
    """Take all of the disk but `room` bytes: at once, so that the job cannot end before."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(file.parent).free - room)


def test_a_checkpoint_is_converted_by_a_job(cluster: Cluster, uninterrupted: Job, tmp_path: Path):
    conversion = ["slurm/convert.sh", "--from", "native", "--to", "huggingface"]
    places = [str(uninterrupted.folder), str(tmp_path / "exported")]
    options = ["--cpus-per-task=1", "--mem=1G", "--parsable", f"--output={tmp_path}/log"]
    job = Job(cluster.lab, cluster.queue("sbatch", *options, *conversion, *places)[-1], tmp_path, tmp_path / "log")
    assert job.wait_for_end() == "COMPLETED", job.output
    assert (tmp_path / "exported" / "model.safetensors").exists()
