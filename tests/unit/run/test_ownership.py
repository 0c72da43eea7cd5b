"""Whose a run folder is: the newest start's, unless another one is alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.run import ownership
from deberta_xl.run.heartbeat import TAKEN_OVER, Heartbeat
from deberta_xl.run.metrics import MetricsWriter
from deberta_xl.run.ownership import Ownership, claim_folder, own_claim
from deberta_xl.run.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder with a fresh heartbeat; a start counts as dead after a second here."""
    monkeypatch.setattr(ownership, "QUIET_SECONDS", 1.0)
    run_folder = RunFolder(tmp_path / "run")
    run_folder.heartbeat.mkdir(parents=True)
    beat(run_folder, "data")
    return run_folder


def beat(folder: RunFolder, phase: str) -> None:
    """Rank 0's sign of life."""
    (folder.heartbeat / "rank-00000.json").write_text(json.dumps({"phase": phase}))


def claim(job: str, host: str = "n1", process: int = 17) -> str:
    """A start's claim."""
    return f"{job} host {host} process {process} time 1"


def test_claims_of_two_starts_differ_and_name_the_job():
    first, second = (own_claim({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}) for _ in range(2))
    assert first != second
    assert first.startswith("job 12.1 host ")
    assert own_claim({}).startswith("start host ")


def test_a_restart_of_the_same_job_takes_over_at_once_and_the_earlier_one_knows(folder):
    earlier = Ownership(folder.owner, claim_folder(folder, claim("job 12.0")))
    earlier.check()
    later = Ownership(folder.owner, claim_folder(folder, claim("job 12.1", "n2")))
    assert not later.is_lost()
    assert earlier.is_lost()
    with pytest.raises(ConfigError, match="taken over by another start"):
        earlier.check()


def test_a_start_that_is_alive_elsewhere_is_not_robbed(folder):
    claim_folder(folder, claim("job 12.0"))
    timer = threading.Timer(0.4, beat, (folder, "data"))
    timer.start()
    with pytest.raises(ConfigError, match=r"is in use \(job 12.0 host n1"):
        claim_folder(folder, claim("job 13.0"))
    timer.join()
    assert folder.owner.read_text().startswith("job 12.0")


def test_a_start_that_has_fallen_silent_or_said_it_ended_is_replaced(folder):
    claim_folder(folder, claim("job 12.0"))
    assert claim_folder(folder, claim("job 13.0")).startswith("job 13.0")  # after a wait
    beat(folder, "stopped")
    begin = time.monotonic()
    claim_folder(folder, claim("job 14.0"))
    assert time.monotonic() - begin < 1.0
    assert folder.owner.read_text().startswith("job 14.0")


def test_a_start_that_is_still_loading_is_not_robbed_whatever_the_start_before_it_said(folder):
    beat(folder, "done")  # long ago; the first start has not come to its first step
    claim_folder(folder, claim("job 12.0"))
    heartbeat = Heartbeat(folder.heartbeat, 0, Ownership(folder.owner, claim("job 12.0")))
    timer = threading.Timer(0.4, heartbeat.write)
    timer.start()
    with pytest.raises(ConfigError, match=r"is in use \(job 12.0 host n1"):
        claim_folder(folder, claim("job 13.0"))
    timer.join()
    heartbeat.close()


def test_a_clock_that_is_ahead_robs_nobody(folder, monkeypatch):
    claim_folder(folder, claim("job 12.0"))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600.0)
    timer = threading.Timer(0.4, beat, (folder, "data"))
    timer.start()
    with pytest.raises(ConfigError, match="is in use"):
        claim_folder(folder, claim("job 13.0"))
    timer.join()


def test_a_sign_of_life_of_long_ago_needs_no_wait(folder, monkeypatch):
    monkeypatch.setattr(ownership, "QUIET_SECONDS", 60.0)
    claim_folder(folder, claim("job 12.0"))
    long_ago = time.time() - 2 * ownership.FORGOTTEN_SECONDS
    os.utime(folder.heartbeat / "rank-00000.json", (long_ago, long_ago))
    begin = time.monotonic()
    claim_folder(folder, claim("job 13.0"))
    assert time.monotonic() - begin < 30.0


def test_the_loser_of_two_starts_writes_no_metric_more_and_says_whose_the_folder_is(folder):
    mine = Ownership(folder.owner, claim_folder(folder, own_claim({"SLURM_JOB_ID": "12"})))
    writer = MetricsWriter(folder.metrics, folder.tensorboard, first_step=0, total_steps=9, ownership=mine)
    writer.write(1, {"loss": 2.0})
    claim_folder(folder, own_claim({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}))
    with pytest.raises(ConfigError, match=r"taken over by another start of this run: job 12\.1 host .* since 20\d\d-"):
        writer.write(2, {"loss": 1.0})
    with pytest.raises(ConfigError, match="taken over"):
        MetricsWriter(folder.metrics, folder.tensorboard, first_step=0, total_steps=9, ownership=mine)
    writer.close()
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1]


def test_a_dead_process_of_this_machine_needs_no_wait(folder, monkeypatch):
    monkeypatch.setattr(ownership, "QUIET_SECONDS", 60.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim_folder(folder, claim("start", socket.gethostname(), ended.pid))
    begin = time.monotonic()
    claim_folder(folder, claim("start", socket.gethostname(), os.getpid()))
    assert time.monotonic() - begin < 30.0


def test_a_process_whose_folder_was_taken_ends_itself(folder):
    program = f"""
import time
from pathlib import Path
from deberta_xl.run import heartbeat
from deberta_xl.run.ownership import Ownership
heartbeat.INTERVAL_SECONDS = 0.02
heartbeat.Heartbeat(Path({str(folder.heartbeat)!r}), 0, Ownership(Path({str(folder.owner)!r}), "earlier"))
time.sleep(120)
"""
    folder.owner.write_text("later\n")
    result = subprocess.run([sys.executable, "-c", program], timeout=100, capture_output=True, text=True)
    assert result.returncode == TAKEN_OVER
    assert "names another start of this run" in result.stderr


def test_a_folder_that_does_not_exist_yet_is_made_to_be_claimed(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "new")
    claim_folder(folder, "start host here process 1 time 1")
    assert folder.owner.read_text() == "start host here process 1 time 1\n"
