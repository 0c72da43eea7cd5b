"""benchmarks/gpu.py: every part has its outcome, whatever becomes of it, and the report tells what was found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_report import Outcome, read_results, read_tests, write_report

ROOT = Path(__file__).parents[3]
CPU, ONE_GPU = gpu.Machine(0, 0.0), gpu.Machine(1, 24.0)


def part(*scripts: str, seconds: float = 20) -> gpu.Part:
    """Runs these lines of Python, one after another; they find the report's folder in `output`."""

    def commands(output: Path, machine: gpu.Machine) -> list[list[str]]:
        return [["-c", f"from pathlib import Path; output = Path({str(output)!r}); {line}"] for line in scripts]

    return gpu.Part("a trial", seconds, commands)


def test_a_part_that_fails_says_where_its_words_are_and_the_next_command_is_not_run(tmp_path):
    trial = part("raise SystemExit('a complaint')", "(output / 'late').touch()")
    outcome = gpu.ask("trial", trial, tmp_path, CPU, 60)
    assert (outcome.outcome, outcome.reason) == ("failed", f"exit status 1; see {tmp_path}/log/trial.log")
    assert (tmp_path / "log/trial.log").read_text() == "a complaint\n"
    assert not (tmp_path / "late").exists()


def test_a_part_that_takes_too_long_is_ended_with_what_it_has_started(tmp_path):
    child = "import time; time.sleep(5); from pathlib import Path; Path('late').touch()"
    line = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], cwd=output).wait()"
    start = time.monotonic()
    outcome = gpu.ask("trial", part(line, seconds=1.5), tmp_path, CPU, 60)
    assert outcome.outcome == "out of time"
    assert time.monotonic() - start < 5
    time.sleep(max(0.0, 6 - (time.monotonic() - start)))
    assert not (tmp_path / "late").exists()
    assert gpu.ask("trial", part("pass"), tmp_path, CPU, 0.5).reason == "no time was left for it"


def test_a_part_that_the_machine_cannot_do_is_skipped_with_the_reason(tmp_path):
    asked = {name: gpu.ask(name, gpu.PARTS[name], tmp_path, ONE_GPU, 60) for name in ("training", "collectives")}
    assert {outcome.outcome for outcome in asked.values()} == {"skipped"}
    assert asked["training"].reason == "takes 60 GiB of GPU memory, there are 24"
    assert asked["collectives"].reason == "there is one GPU: it has nobody to exchange with"


def test_figures_of_an_earlier_run_are_not_reported(tmp_path):
    (tmp_path / "trial.json").write_text("{}")
    outcome = gpu.ask("trial", part("raise SystemExit(1)"), tmp_path, CPU, 60)
    assert read_results(tmp_path, [outcome]) == {}


def test_the_report_has_what_every_part_found(tmp_path):
    figure = {"milliseconds": 4.104, "speed": 1.88, "peak_mib": 100.4, "utilization": 0.317}
    cases = [{"case": "16 x 512, dropout 0", "ways": {"fused": figure}, "not_measured": {"strided": "out of memory"}}]
    results = {
        "facts": {"devices": [{"name": "NVIDIA H200", "memory_gib": 139.8}], "torch": "2.13.0", "triton": None},
        "tests": [
            {"test": "test_a", "outcome": "passed", "why": "", "seconds": 1.0},
            {"test": "test_b", "outcome": "failure", "why": "assert 1 == 2", "seconds": 1.0},
        ],
        "step": {"cases": cases},
        "training": {"step_seconds": 0.51234, "busiest": [["mm", 12.345, 96]]},
        "collectives": {"ranks": 8, "backend": "nccl", "figures": [
            {"collective": "all-reduce", "mib": 64, "gb_per_second": 210.0}]},
    }  # fmt: skip
    outcomes = [Outcome(name, f"about {name}", "done", "", 1.0) for name in results]
    text = write_report(tmp_path, {"date": "2026-11-26", "revision": "abc"}, outcomes, results)
    assert text == (tmp_path / "report.md").read_text()
    assert text.startswith("# 1 x NVIDIA H200\n")
    for expected in (
        "| step | about step | done | 1 |  |",
        "1 passed, 1 failure",
        "* 1 failure: test_b: assert 1 == 2",
        "| 16 x 512, dropout 0 | fused | 4.10 | 1.88 | 100 | 31.7% |",
        "| 16 x 512, dropout 0 | strided | not measured: out of memory |  |  |  |",
        "| step_seconds | 0.5123 |",
        "| mm | 12.35 | 96 |",
        "| all-reduce | 64 | 210.00 |",
        "| device | name NVIDIA H200, memory_gib 139.8 |",
    ):
        assert expected in text.splitlines()
    assert json.loads((tmp_path / "report.json").read_text())["results"] == results


def test_tests_are_read_from_what_pytest_writes(tmp_path):
    (tmp_path / "test_trial.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "def test_left(): pytest.skip('needs\\na GPU')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path}/tests.xml"]
    subprocess.run([*command, "test_trial.py"], cwd=tmp_path, capture_output=True, check=False)
    found = {test["test"]: (test["outcome"], test["why"]) for test in read_tests(tmp_path / "tests.xml")}
    assert found == {
        "test_good": ("passed", ""),
        "test_bad": ("failure", "assert 1 == 2"),
        "test_left": ("skipped", "needs"),
    }


@pytest.mark.full
def test_all_of_it_runs_small_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {part["name"]: part["outcome"] for part in report["parts"]} == dict.fromkeys(gpu.PARTS, "done")
    assert report["results"].keys() == gpu.PARTS.keys()
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
    assert {test["outcome"] for test in report["results"]["tests"]} == {"skipped"}
