"""The scripts as text, and as the scheduler of a large cluster understands them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, Cluster, Job
from lab import Lab, require, wait_for
from small_dataset import documents

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [script for script in SCRIPTS if "\n#SBATCH" in script.read_text()]
SHELL = [*SCRIPTS, *sorted((ROOT / "slurm" / "lib").glob("*.sh")), ROOT / "slurm" / "site.env.example"]


def headers(script: Path) -> dict[str, str]:
    """Option -> value ("" for a flag) of a job script's #SBATCH lines."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script.read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_bash_can_parse_it(script: Path):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


def test_shellcheck_has_no_complaint():
    require({"shellcheck": "shellcheck"})
    result = subprocess.run(["shellcheck", "-x", *map(str, SHELL)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_no_header_stands_below_the_first_command(script: Path):
    # sbatch ignores such a line without a word.
    lines = script.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_the_scheduler_understands_the_headers(big_lab: Lab, script: Path):
    stated = headers(script)
    answer = big_lab.run("sbatch", "--test-only", str(script))
    assert answer.returncode == 0, answer.stdout
    submitted = big_lab.run("sbatch", "--hold", "--parsable", "--output=/dev/null", str(script))
    assert submitted.returncode == 0, submitted.stdout
    number = submitted.stdout.split()[-1]
    job = wait_for(lambda: big_lab.job(number), f"job {number}")
    big_lab.run("scancel", number)
    nodes, per_node = int(stated["nodes"]), int(stated["ntasks-per-node"])
    assert int(job["NumNodes"].split("-")[0]) == nodes
    assert int(job["NumTasks"]) == nodes * per_node
    assert job["CPUs/Task"] == stated["cpus-per-task"]
    assert job.get("TresPerNode", "") == (f"gres:{stated['gres']}" if "gres" in stated else "")
    assert job["TimeLimit"] == stated["time"].replace("24:00:00", "1-00:00:00")
    assert job["Requeue"] == ("1" if "requeue" in stated else "0")
    assert job["JobName"] == stated["job-name"]
    assert job["OverSubscribe"] == ("NO" if "exclusive" in stated else "OK")
    assert job["MinMemoryNode"] == stated["mem"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--nodes=17"], "node"),
        (["--gres=gpu:9"], "not available"),
        (["--cpus-per-task=13"], "not available"),
        (["--partition=nowhere"], "partition"),
    ],
)
def test_the_scheduler_refuses_what_the_cluster_does_not_have(big_lab: Lab, options: list[str], reason: str):
    answer = big_lab.run("sbatch", "--test-only", *options, str(ROOT / "slurm" / "pretrain_1.5b.sh"))
    assert answer.returncode != 0
    assert reason in answer.stdout


def test_preprocessing_over_two_nodes_writes_what_one_process_writes(cluster: Cluster, tmp_path: Path):
    texts = documents()[:60]
    for number in range(5):
        lines = [json.dumps({"text": text}) for text in texts[number::5]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    cluster.dataset.tokenizer.save(tmp_path / "tokenizer")
    inputs = ["--input", str(tmp_path / "*.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    for name in ("alone", "nodes"):
        (tmp_path / name).mkdir()
    alone = ["tools/preprocess.py", *inputs, "--output", str(tmp_path / "alone" / "data"), "--workers", "1"]
    subprocess.run([sys.executable, *alone], cwd=ROOT, check=True, capture_output=True)
    options = ["--nodes=2", "--cpus-per-task=1", "--parsable", f"--output={tmp_path}/log"]
    command = ["sbatch", *options, "slurm/preprocess.sh", *inputs, "--output", str(tmp_path / "nodes" / "data")]
    job = Job(cluster.lab, cluster.queue(*command)[-1], tmp_path, tmp_path / "log")
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.output.count("60 documents") == 1
    assert contents(tmp_path / "alone") == contents(tmp_path / "nodes")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
