"""How a job goes on after its ranks have ended, with ranks that are over in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Cluster, Job

# launch.sh as it is, but for the pre-flight, which needs ranks that can do more.
SCRIPT = """\
#!/bin/bash
. slurm/lib/launch.sh
preflight() { :; }
launch ranks.py "$@"
"""
#: What the ranks of a job do.
RANKS = """\
import os, sys
from pathlib import Path

rank = int(os.environ.get("SLURM_PROCID", "0"))
folder = Path(sys.argv[-1].removeprefix("run.folder="))
if "--check" not in sys.argv:
    {ending}
"""


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path):
    """Starts a job of two ranks that end in a certain way, in a run folder that was another job's."""

    def submit(ending: str, owner: str = "job 4000000.0 host n1 process 1 time 1") -> Job:
        (cluster.checkout / "job.sh").write_text(SCRIPT)
        (cluster.checkout / "ranks.py").write_text(RANKS.format(ending=ending))
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "OWNER").write_text(owner + "\n")
        options = ["--ntasks=2", "--ntasks-per-node=2", "--mem=100", "--requeue", "--open-mode=append", "--parsable"]
        command = ["sbatch", *options, f"--output={tmp_path}/log", "job.sh", f"run.folder={folder}"]
        return Job(cluster.lab, cluster.queue(*command, MAX_CRASHES="2")[-1], folder, tmp_path / "log")

    return submit


def test_a_start_that_crashes_before_it_claims_another_jobs_folder_is_tried_again(start):
    job = start("os._exit(1)")
    assert job.wait_for_end() == "FAILED", job.output
    assert job.restarts == 1, job.output
    assert "giving up" in job.output
    assert "belongs to" not in job.output


def test_a_refusal_of_the_ranks_is_not_tried_again(start, cluster: Cluster):
    job = start("os._exit(4)")
    assert job.wait_for_end() == "FAILED", job.output
    assert job.restarts == 0
    assert cluster.lab.job(job.number)["ExitCode"] == "2:0"
    assert "error: another start would end there, too; mend what the ranks said above" in job.output


def test_an_error_that_ends_the_ranks_later_is_a_crash(start):
    job = start("os._exit(2)")
    assert job.wait_for_end() == "FAILED", job.output
    assert job.restarts == 1


def test_a_job_whose_folder_another_one_took_ends(start):
    job = start("if rank == 0: (folder / 'OWNER').write_text('job 4000001.0 host n2')\n    os._exit(3 * (rank == 0))")
    assert job.wait_for_end() == "FAILED", job.output
    assert job.restarts == 0
    assert "belongs to job 4000001.0 host n2; this job ends" in job.output
