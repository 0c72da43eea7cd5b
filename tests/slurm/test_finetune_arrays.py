"""What each task of an array of fine-tuning runs is started with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from jobs import ROOT

ARGUMENTS = ["--task", "rte", "--data", "glue", "--init", "runs/base", "run.folder=runs/rte"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose `launch` says what it would start."""
    (tmp_path / "slurm" / "lib").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "finetune_sift.sh", tmp_path / "slurm")
    functions = (ROOT / "slurm" / "lib" / "launch.sh").read_text()
    (tmp_path / "slurm" / "lib" / "launch.sh").write_text(f'{functions}\nlaunch() {{ printf "%s\\n" "$@"; }}\n')
    (tmp_path / "sweep.txt").write_text(
        "# rate and weight\noptimizer.learning_rate=1e-5 sift.weight=3\n\noptimizer.learning_rate=2e-5\n"
    )
    return tmp_path


def start(root: Path, *arguments: str, task: int | None = None) -> subprocess.CompletedProcess[str]:
    """The script, as the scheduler would start it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "DEBERTA_XL_"))}
    environment |= {"DEBERTA_XL_ROOT": str(root)} | ({} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)})
    command = ["bash", "slurm/finetune_sift.sh", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)


def last(result: subprocess.CompletedProcess[str], key: str) -> str | None:
    """The value of a key that holds in the end."""
    assert result.returncode == 0, result.stderr
    values = [line.partition("=")[2] for line in result.stdout.splitlines() if line.startswith(f"{key}=")]
    return values[-1] if values else None


def test_a_single_job_uses_the_folder_it_is_given(root):
    result = start(root, *ARGUMENTS)
    assert last(result, "run.folder") == "runs/rte"
    assert last(result, "train.seed") is None
    assert result.stdout.splitlines()[0] == "deberta_xl/finetune.py"
    assert "finetune_sift" in result.stdout.splitlines()


def test_a_task_of_an_array_has_a_seed_and_a_folder_of_its_own(root):
    result = start(root, *ARGUMENTS, task=3)
    assert (last(result, "train.seed"), last(result, "run.folder")) == ("3", "runs/rte-3")


@pytest.mark.parametrize(
    ("task", "seed", "rate", "weight"), [(1, "1", "1e-5", "3"), (2, "1", "2e-5", None), (3, "2", "1e-5", "3")]
)
def test_a_sweep_goes_through_its_lines_and_then_to_the_next_seed(root, task, seed, rate, weight):
    result = start(root, *ARGUMENTS, "--sweep", "sweep.txt", task=task)
    assert last(result, "train.seed") == seed
    assert last(result, "optimizer.learning_rate") == rate
    assert last(result, "sift.weight") == weight
    assert last(result, "run.folder") == f"runs/rte-{task}"
    assert "--sweep" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "task", "words"),
    [
        (["--sweep", "nothing.txt"], 1, "--sweep nothing.txt: there is no such file"),
        (["--sweep", "sweep.txt"], None, "--sweep needs an array"),
        (["--sweep", "slurm/lib/empty"], 1, "holds no line of overrides"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(root, arguments, task, words):
    (root / "slurm" / "lib" / "empty").write_text("# nothing\n")
    result = start(root, *ARGUMENTS, *arguments, task=task)
    assert result.returncode == 2
    assert words in result.stderr
