"""Functions of launch.sh by themselves, in bash, without SLURM: what a run folder holds is text and never code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from jobs import ROOT

CODE = "a[$(touch HARM)]"


def bash(folder: Path, commands: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run commands after launch.sh has been read, in a run folder of that name."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DEBERTA_XL_"))}
    program = (
        f". {ROOT}/slurm/lib/launch.sh; run_folder={folder} job=7 training_pid='' asked='' owner_before=''\n{commands}"
    )
    facts = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", **variables}
    return subprocess.run(
        ["bash", "-c", program], cwd=folder, env={**kept, **facts}, capture_output=True, text=True, timeout=20
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a checkpoint."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "LATEST").write_text("step-00000010\n")
    return tmp_path


@pytest.mark.parametrize("count", [CODE, "-1", "0x10", "1+1", "b", "", "9" * 30])
def test_what_stands_in_slurm_crashes_is_a_number_or_nothing(folder, count):
    (folder / "slurm" / "crashes").write_text(f"7 {count} step-00000010\n")
    assert bash(folder, "check_crashes", DEBERTA_XL_CHAIN="7").returncode == 0
    assert "crash 1 of at most 3 in a row" in bash(folder, "count_crash").stdout
    assert not (folder / "HARM").exists()


def test_a_count_with_a_zero_in_front_is_decimal(folder):
    (folder / "slurm" / "crashes").write_text("7 08 step-00000010\n")
    assert "has crashed 8 times in a row" in bash(folder, "check_crashes", DEBERTA_XL_CHAIN="7").stderr
    assert "crash 9 of at most 10 in a row" in bash(folder, "count_crash", MAX_CRASHES="10").stdout


def test_crashes_in_a_row_are_counted_and_a_new_checkpoint_begins_the_count_anew(folder):
    said = bash(
        folder, "count_crash; count_crash; count_crash; echo status $?; echo step-20 >LATEST; count_crash"
    ).stdout
    assert [line.split(": ")[1][:7] for line in said.splitlines() if "of at most" in line] == [
        "crash 1", "crash 2", "crash 3", "crash 1"
    ]  # fmt: skip
    assert "status 1\n" in said


@pytest.mark.parametrize(
    "name", ["MAX_CRASHES", "WATCHDOG_SECONDS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_GPUS_ON_NODE"]
)
@pytest.mark.parametrize("value", [CODE, "3;", "three", "-3"])
def test_a_variable_that_should_be_a_number_and_is_not_is_refused(folder, name, value):
    done = bash(folder, "find_python() { :; }; launch x.py run.folder=$run_folder", **{name: value})
    assert done.returncode == 2
    assert f"error: {name}={value} is not a whole number" in done.stderr
    assert not (folder / "HARM").exists()


def test_a_watchdog_without_patience_is_refused(folder):
    done = bash(folder, "find_python() { :; }; launch x.py run.folder=$run_folder", WATCHDOG_SECONDS="00")
    assert done.returncode == 2
    assert "error: WATCHDOG_SECONDS=0 would end every start at once" in done.stderr


def test_a_pipe_or_a_device_in_the_run_folder_is_no_line_of_it(folder):
    (folder / "LATEST").unlink()
    os.mkfifo(folder / "LATEST")
    (folder / "STATE").symlink_to("/dev/zero")
    assert bash(folder, "read_line LATEST; read_line STATE; read_line OWNER; echo end").stdout == "end\n"


def test_a_run_that_has_diverged_is_not_started_again_by_slurm_nor_by_the_rest_of_its_chain(folder):
    (folder / "STATE").write_text("diverged\n")
    stub = "job_field() { echo 0; }; requeue() { echo requeued; }; training_pid=1"
    done = bash(folder, f"{stub}; conclude 4", DEBERTA_XL_CHAIN="chain-5")
    assert (done.returncode, "requeued" in done.stdout) == (2, False)
    assert "error: the run has diverged; do what the ranks said above, then submit the command again" in done.stderr
    rest = bash(folder, "check_crashes", DEBERTA_XL_CHAIN="chain-5")
    assert (rest.returncode, "the rest of it does nothing" in rest.stderr) == (2, True)
    assert bash(folder, "check_crashes", DEBERTA_XL_CHAIN="chain-6").returncode == 0


@pytest.mark.parametrize("path", ["~/x", "~", "~root/a b", "~nobody77/x", "/a/~b", "~/$(touch HARM)", ""])
def test_a_home_in_the_run_folders_name_is_what_python_takes_it_for(folder, path):
    for begin in ("", "unset HOME; "):
        said = bash(folder, f'{begin}last_value run.folder "$GIVEN"', GIVEN=f"run.folder={path}")
        assert (said.stdout, said.stderr) == (os.path.expanduser(path), "")
    assert not (folder / "HARM").exists()


def submit(folder: Path, *arguments: str) -> list[str]:
    """What submit.sh says where a pretended sbatch takes every job; the last line first."""
    sbatch = folder / "sbatch"
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 42\n")
    sbatch.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "slurm/submit.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20
    )
    return (done.stdout + done.stderr).splitlines()[::-1]


def test_the_log_that_submit_names_can_be_typed_whatever_the_job_is_called(folder):
    said = submit(folder, "--job-name=a & $(b)", "--array=2-5", "slurm/convert.sh")[0]
    assert said.endswith(r"tail -F a\ \&\ \$\(b\)-42_2.out")
    (folder / "own.sh").write_text("#!/bin/sh\n")
    assert submit(folder, str(folder / "own.sh"))[0].endswith("tail -F slurm-42.out")


@pytest.mark.parametrize(
    ("option", "reason"),
    {
        "--nodes=0": "--nodes=0: give one number, at least 1",
        "--ntasks-per-node=0": "--ntasks-per-node=0: give a number of ranks",
        "--nodes=08": "--nodes=08: give one number",
        "--chain": "--chain slurm/convert.sh is not a number of jobs",
    }.items(),
)
def test_a_size_that_is_none_is_refused_by_submit(folder, option, reason):
    assert f"error: {reason}" in submit(folder, option, "slurm/convert.sh")[0]
