"""`.ci/run`, with a `make` that says what a run of pytest would: what it adds up, and when it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAST = "===== 2 failed, 1209 passed, 1 skipped, 1 warning in 640.12s (0:10:40) ====="
FULL = "===== 90 passed, 2 warnings, 1 error in 1440.50s (0:24:00) ====="
BOTH = "===== 2 failed, 1299 passed, 1 skipped, 3 warnings, 1 errors in 2080.62s (0:34:40) ====="
MAKE = """#!/bin/sh
echo "$1" >> made
case $1 in
lint) exit $LINT ;;
test) echo "$FAST"; echo "make: all the same" >&2; exit $TEST ;;
test-full) echo "$FULL"; exit $TEST_FULL ;;
esac
"""


def ci_run(folder: Path, **said: str) -> tuple[int, list[str], list[str]]:
    """Exit status of `.ci/run`, the lines it printed, and what it had made."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    make = folder / "bin" / "make"
    make.parent.mkdir()
    make.write_text(MAKE)
    make.chmod(0o755)
    environment = os.environ | {"LINT": "0", "TEST": "0", "TEST_FULL": "0", "FAST": FAST, "FULL": FULL} | said
    environment["PATH"] = f"{make.parent}:{environment['PATH']}"
    done = subprocess.run([folder / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), (folder / "made").read_text().split()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({}, 0),
        ({"LINT": "3"}, 3),
        ({"TEST": "2"}, 2),
        ({"TEST_FULL": "2"}, 2),
        ({"LINT": "1", "TEST": "2"}, 1),
    ],
)
def test_everything_runs_once_and_the_first_failure_is_the_status(tmp_path, said, status):
    code, lines, made = ci_run(tmp_path, **said)
    assert (code, made) == (status, ["lint", "test", "test-full"])
    assert lines[-3:] == [FAST, FULL, BOTH]


@pytest.mark.parametrize("lost", ["FAST", "FULL"])
def test_tests_that_did_not_come_to_an_end_have_failed(tmp_path, lost):
    code, lines, _ = ci_run(tmp_path, **{lost: "Killed"})
    assert code == 1
    assert lines[-1] == "pytest did not come to an end"
