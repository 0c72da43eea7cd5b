"""Preprocessing by several MPI processes writes what one process writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_xl.corpus.spread_preprocessing import share_of

ROOT = Path(__file__).parent.parent.parent.parent
TOOL = str(ROOT / "tools" / "preprocess.py")
MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.fixture
def work(tmp_path: Path, texts: list[str], tokenizer) -> Path:
    """A folder with five files of different sizes, some records bad, and a tokenizer."""
    tokenizer.save(tmp_path / "tokenizer")
    for number, (start, stop) in enumerate([(0, 120), (120, 125), (125, 126), (126, 230), (230, 300)]):
        lines = [json.dumps({"text": text}) for text in texts[start:stop]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*lines, "{bad", *lines[:3]]))
    (tmp_path / "9.txt").write_text("\n\n".join(texts[40:80]))
    return tmp_path


def run(work: Path, output: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The tool, alone or under MPI."""
    python = [sys.executable] if processes == 1 else [str(MPIRUN), "-n", str(processes), sys.executable, "-m", "mpi4py"]
    inputs = ["--input", str(work / "*.jsonl"), str(work / "9.txt"), "--tokenizer", str(work / "tokenizer")]
    outputs = ["--output", str(work / output / "train"), "--valid_output", str(work / output / "valid")]
    command = [*python, TOOL, *inputs, *outputs, "--valid_share", "0.2", "--workers", "1", *arguments]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "SLURM", "OMPI"))}
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=200)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_three_processes_write_what_one_writes_byte_for_byte(work: Path):
    alone, together = run(work, "alone"), run(work, "together", processes=3)
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    assert contents(work / "alone") == contents(work / "together")
    assert len(contents(work / "alone")) >= 8
    assert together.stdout.count("read back") == 2  # said once, not by every process
    counted = [line for line in alone.stdout.splitlines() if "unknown tokens" in line]
    assert counted == [line for line in together.stdout.splitlines() if "unknown tokens" in line]
    assert alone.stderr.splitlines()[-5:] == together.stderr.splitlines()[-5:]  # the same bad records, in order


def test_an_error_of_one_process_ends_all_and_leaves_nothing(work: Path):
    result = run(work, "strict", "--strict", processes=3)
    assert result.returncode != 0
    assert "strict stops at the first bad record" in result.stderr
    assert contents(work / "strict") == {}
    shutil.rmtree(work / "strict")
    assert run(work, "strict", processes=2).returncode == 0
    again = run(work, "strict", processes=2)
    assert again.returncode != 0
    assert "--overwrite to replace the dataset" in again.stderr


def test_mpirun_without_mpi4py_is_refused(work: Path):
    command = [str(MPIRUN), "-n", "2", sys.executable, TOOL, "--input", "x.txt", "--tokenizer", "t", "--output", "o"]
    result = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=200)
    assert result.returncode != 0
    assert "mpirun -n N python -m mpi4py tools/preprocess.py" in result.stderr


def test_mpi_is_not_imported_without_mpi(work: Path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import preprocess; print('mpi4py' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "False", result.stderr


def test_files_are_shared_out_by_size_and_every_one_once():
    sizes = [5, 90, 40, 30, 20, 10]
    shares = [share_of(rank, 3, sizes) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(6))
    assert shares[0] == [1]
    assert max(sum(sizes[number] for number in share) for share in shares) == 90
    assert [share_of(rank, 4, [7]) for rank in range(4)] == [[0], [], [], []]
