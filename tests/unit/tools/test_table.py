"""The table over runs: seeds in one row, settings apart, unfinished and undefined ones said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent


def write_run(folder: Path, seed: int, weight: float, value: float | None, metric: str = "accuracy") -> None:
    """What a finished run leaves for the table."""
    folder.mkdir()
    config = f'[run]\nfolder = "{folder}"\n[train]\nseed = {seed}\n[sift]\nweight = {weight}\n'
    (folder / "config.toml").write_text(config)
    results = {"task": "rte", "metrics": {"valid": {metric: value}}}
    (folder / "results.json").write_text(json.dumps(results))


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The tool's output."""
    command = [sys.executable, str(ROOT / "tools" / "table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_seeds_are_one_row_and_settings_are_rows(tmp_path):
    for seed, value in ((1, 0.5), (2, 0.7)):
        write_run(tmp_path / f"plain-{seed}", seed, 0.0, value)
    write_run(tmp_path / "sift-1", 1, 5.0, 0.9)
    write_run(tmp_path / "sift-2", 2, 5.0, None)
    (tmp_path / "unfinished").mkdir()
    result = table(f"{tmp_path}/*", "--output", str(tmp_path / "table.md"))
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in result.stdout.splitlines()[2:]]
    assert rows == [
        ["rte", "sift.weight=0.0", "accuracy", "2", "0.6000", "0.1414", "0.7000 (plain-2)"],
        ["rte", "sift.weight=5.0", "accuracy", "1 of 2", "0.9000", "–", "0.9000 (sift-1)"],
    ]
    assert "1 folders have no results.json yet" in result.stderr
    assert (tmp_path / "table.md").read_text() == result.stdout


def test_the_best_of_an_error_is_the_smallest(tmp_path):
    for seed, value in ((1, 0.5), (2, 0.7)):
        write_run(tmp_path / f"run-{seed}", seed, 0.0, value, "mean_squared_error")
    assert table(f"{tmp_path}/*").stdout.rstrip().endswith("| 0.5000 (run-1) |")


def test_a_split_that_was_not_measured_is_an_error(tmp_path):
    write_run(tmp_path / "run", 1, 0.0, 0.5)
    result = table(f"{tmp_path}/run", "--split", "tset")
    assert result.returncode == 2
    assert "--split tset: the runs have measured valid" in result.stderr


def test_no_finished_run_is_an_error(tmp_path):
    result = table(f"{tmp_path}/*")
    assert result.returncode == 2
    assert "no finished fine-tuning run" in result.stderr
