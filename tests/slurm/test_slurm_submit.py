"""submit.sh and the start of a job: what cannot work is refused in seconds, with one line that says what to change."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import ROOT, SCRIPT, Cluster, make_checkout, user_environment
from lab import Lab, wait_for
from small_dataset import SmallDataset

Submit = Callable[..., subprocess.CompletedProcess[str]]
PRETRAIN = ["train.global_batch_size=2048", "model.vocab_size=none", "data.valid=none"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a user has it."""
    return make_checkout(tmp_path_factory.mktemp("submit") / "checkout")


@pytest.fixture
def submit(big_lab: Lab, checkout: Path, small_dataset: SmallDataset, tmp_path: Path) -> Submit:
    """Runs submit.sh on the pretended GPU cluster with a good dataset and run folder; arguments come last and win."""

    def run(*arguments: str, options: list[str] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        data = [f"data.train={small_dataset.train}", f"run.folder={tmp_path / 'runs' / 'first'}", *PRETRAIN]
        command = ["bash", "slurm/submit.sh", *(options or ["--dry-run"]), SCRIPT, *data, *arguments]
        return big_lab.run(*command, cwd=checkout, extra=user_environment(**variables))

    return run


def queue(lab: Lab) -> list[str]:
    """Name and dependency of every queued job."""
    return lab.run("squeue", "--noheader", "--format=%j %E").stdout.splitlines()


def test_a_dry_run_shows_the_job_asks_the_scheduler_and_queues_nothing(submit: Submit, big_lab: Lab, tmp_path: Path):
    answer = submit()
    assert answer.returncode == 0, answer.stdout
    assert "16 nodes x 8 ranks" in answer.stdout
    assert "ranks: 128 = 128 data-parallel" in answer.stdout
    assert re.search(r"each rank: [0-9,]+ parameters, [0-9.]+ GiB ", answer.stdout)
    assert re.search(r"Job \d+ to start at .* using 1536 processors on nodes n\[1-16\]", answer.stdout)
    assert "nothing was queued" in answer.stdout
    assert not queue(big_lab)
    assert not list(tmp_path.iterdir())


def test_options_of_sbatch_override_the_headers(submit: Submit):
    answer = submit("parallel.tensor_parallel_size=2", options=["--dry-run", "-N", "4"])
    assert answer.returncode == 0, answer.stdout
    assert "ranks: 32 = 16 data-parallel x 2 tensor-parallel" in answer.stdout
    assert "using 384 processors" in answer.stdout


def test_a_job_that_asks_for_gpus_is_planned_for_them_where_there_are_none(submit: Submit):
    answer = submit("--deepspeed_config", "deepspeed_configs/cpu_debug.json", DS_ACCELERATOR="", GPU_MEMORY_GIB="")
    assert answer.returncode == 0, answer.stdout
    assert re.search(r"GiB \(.*\) estimated, with \w+ attention on a GPU", answer.stdout)


def test_a_run_in_stages_is_laid_out_over_the_headers_ranks(submit: Submit):
    answer = submit("parallel.pipeline_parallel_size=2")
    assert answer.returncode == 0, answer.stdout
    assert "ranks: 128 = 2 pipeline stages x 64 data-parallel x 1 tensor-parallel" in answer.stdout
    assert "x 4 accumulated" in answer.stdout


def test_replaced_token_detection_is_checked_as_a_job_of_its_own_size(
    big_lab: Lab, checkout: Path, small_dataset: SmallDataset, tmp_path: Path
):
    data = [
        f"data.train={small_dataset.train}",
        "data.valid=none",
        f"run.folder={tmp_path}/v3",
        "model.vocab_size=none",
    ]
    command = ["bash", "slurm/submit.sh", "--dry-run", "slurm/pretrain_v3.sh", *data]
    answer = big_lab.run(*command, cwd=checkout, extra=user_environment())
    assert answer.returncode == 0, answer.stdout
    assert "4 nodes x 8 ranks" in answer.stdout
    assert "ranks: 32 = 32 data-parallel" in answer.stdout
    assert "x 32 accumulated" in answer.stdout
    assert re.search(r"each rank.* [0-9,]+ parameters, [0-9.]+ GiB ", answer.stdout)
    assert "using 384 processors" in answer.stdout
    refused = big_lab.run(*command, "parallel.pipeline_parallel_size=2", cwd=checkout, extra=user_environment())
    assert refused.returncode == 2, refused.stdout
    assert "replaced_tokens" in refused.stdout.splitlines()[-1]


def test_a_chain_is_n_jobs_of_one_name_that_are_not_requeued(submit: Submit, big_lab: Lab):
    answer = submit(options=["--chain", "3", "--hold"])
    assert answer.returncode == 0, answer.stdout
    numbers = re.findall(r"Submitted batch job (\d+)", answer.stdout)
    log, board = f"tail -F pretrain-1.5b-first-{numbers[-1]}.out", "tensorboard --logdir "
    assert log in answer.stdout.splitlines()[-1]
    assert board in answer.stdout.splitlines()[-1]
    jobs = [big_lab.job(number) for number in numbers]
    big_lab.run("scancel", *numbers)
    assert [job["JobName"] for job in jobs] == ["pretrain-1.5b-first"] * 3
    assert [job["Requeue"] for job in jobs] == ["0"] * 3
    assert all("singleton" in job["Dependency"] for job in jobs[1:])


BAD = {
    "a mistyped key": (["train.stepz=3"], "did you mean 'steps'"),
    "no dataset": (["data.train=/nowhere/train"], "/nowhere/train"),
    "no weights to start from": (["train.init=/nowhere"], "/nowhere is not a folder"),
    "a batch that does not divide": (["train.global_batch_size=1000"], "is not a multiple of"),
    "a layout that does not fit": (["parallel.tensor_parallel_size=5"], "does not divide"),
    "no such preset": (["--config", "xxxlarge"], "did you mean 'xxlarge'"),
    "no such engine file": (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
    "a run folder below a file": (["run.folder=README.md/run"], "run.folder"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused_before_it_is_queued(
    submit: Submit, big_lab: Lab, checkout: Path, arguments: list[str], reason: str
):
    (checkout / "README.md").touch()
    answer = submit(*arguments, options=["--hold"])
    assert answer.returncode == 2, answer.stdout
    assert reason in answer.stdout.splitlines()[-1]
    assert not queue(big_lab)


SHORT = {
    "--partition=nowhere": "there is no partition nowhere; choose one of: main urgent",
    "--gres=gpu:9": "9 GPUs asked per node, 8 there: --gres=gpu:8",
    "--nodes=32": "32 nodes asked, 16 there: --nodes=16",
    "--cpus-per-task=13": "104 cores asked per node (8 x 13), 96 there: --cpus-per-task=12",
    "--mem=4T": "4194304 MiB of memory per node asked, 2000000 there: --mem=2000000M",
}


@pytest.mark.parametrize(("option", "words"), SHORT.items())
def test_resources_that_the_cluster_does_not_have_are_named_with_what_to_type(
    big_lab: Lab, checkout: Path, option: str, words: str
):
    command = ["bash", "slurm/submit.sh", "--ntasks-per-node=8", "--cpus-per-task=12", option, "slurm/preprocess.sh"]
    answer = big_lab.run(*command, cwd=checkout, extra=user_environment())
    assert answer.returncode == 2, answer.stdout
    assert answer.stdout.splitlines()[-1] == f"error: the scheduler would not take this job: {words}"
    assert not queue(big_lab)


OWN = """#!/bin/bash
#SBATCH --job-name=own
#SBATCH --output=%x-%j.log
touch first
. slurm/lib/launch.sh
folder=$(python -c 'open("second", "w")') && TOUCH=1 touch third
launch deberta_xl/pretrain.py --config debug --deepspeed_config deepspeed_configs/cpu_debug.json "$@"
"""
DRY = {
    "preprocess": ("slurm/preprocess.sh", "--input", "text.txt", "--tokenizer", "tokenizer", "--output", "data"),
    "convert": ("--mem=1G", "slurm/convert.sh", "--to", "huggingface", "run", "exported"),
    "a script without launch": ("other.sh",),
    "a script that does more than to launch": ("own.sh", "run.folder=runs/own"),
}


@pytest.mark.parametrize("arguments", DRY.values(), ids=DRY)
def test_nothing_of_any_script_is_done_before_it_is_queued(
    big_lab: Lab, small_dataset: SmallDataset, tmp_path: Path, arguments: tuple[str, ...]
):
    checkout = make_checkout(tmp_path / "checkout")
    (checkout / "other.sh").write_text("#!/bin/bash\ntouch done\n")
    (checkout / "own.sh").write_text(OWN)
    before = sorted(checkout.rglob("*"))
    data = [f"data.train={small_dataset.train}"] if "own.sh" in arguments else []
    command = ["bash", "slurm/submit.sh", "--dry-run", *arguments, *data]
    answer = big_lab.run(*command, cwd=checkout, extra=user_environment())
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.splitlines()[-1] == "== dry run: nothing was queued"
    assert sorted(checkout.rglob("*")) == before
    assert not queue(big_lab)


def test_an_array_is_logged_under_the_numbers_of_its_tasks(big_lab: Lab, checkout: Path):
    command = ["bash", "slurm/submit.sh", "--hold", "--array=3-5", "--nodes=1", "slurm/preprocess.sh"]
    answer = big_lab.run(*command, cwd=checkout, extra=user_environment())
    (number,) = re.findall(r"Submitted batch job (\d+)", answer.stdout)
    log = big_lab.job(number)["StdOut"]
    big_lab.run("scancel", number)
    assert f"preprocess-{number}_" in log
    assert f"tail -F preprocess-{number}_3.out" in answer.stdout.splitlines()[-1]
    assert answer.stdout.splitlines()[0] == "== slurm/preprocess.sh on 1 node x 1 rank"


WHO = "from deberta_xl.base.launch import read_launch; print('WHO', *read_launch())"


@pytest.mark.skipif(shutil.which("script") is None, reason="no terminal to be had without script(1)")
def test_what_is_typed_into_a_shell_of_srun_pty_is_one_process_and_what_srun_starts_are_ranks(
    big_lab: Lab, tmp_path: Path
):
    (tmp_path / "who.py").write_text(WHO)
    typed = tmp_path / "typed"
    typed.write_text(f"python {tmp_path}/who.py\nexit\n")
    answers = []
    for command, given in (("bash", typed), (f"python {tmp_path}/who.py", "/dev/null")):
        line = f"timeout 60 script -qec 'srun -n 2 --mem=100 --mpi=none --pty {command}' /dev/null < {given}"
        said = big_lab.run("bash", "-c", line, cwd=tmp_path, extra=user_environment(PYTHONPATH=str(ROOT))).stdout
        answers += re.findall(r"WHO (\d+ \d+ \d+)", said)
    assert answers == ["0 1 0", "0 2 0"]


def test_submit_explains_itself(checkout: Path):
    said = subprocess.run(["bash", "slurm/submit.sh", "--help"], cwd=checkout, capture_output=True, text=True)
    assert said.returncode == 0
    assert said.stdout.startswith("Check a job, then queue it.")
    assert "set -" not in said.stdout


def test_a_run_that_does_not_fit_the_memory_is_refused(submit: Submit):
    answer = submit(GPU_MEMORY_GIB="16")
    assert answer.returncode == 2
    assert "does not fit GPU_MEMORY_GIB=16" in answer.stdout


def test_a_job_script_outside_a_job_says_how_to_start_it(checkout: Path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    result = subprocess.run(["bash", SCRIPT], cwd=checkout, env=kept, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("start this script with sbatch or slurm/submit.sh")
    result = subprocess.run(["bash", checkout / SCRIPT], cwd="/", env=kept, capture_output=True, text=True)
    assert result.returncode == 2
    assert "submit from the root of the repository" in result.stderr


def refused(cluster: Cluster, folder: Path, *arguments: str, options: list[str] | None = None) -> str:
    """The error lines of a job that is refused before its first step."""
    job = cluster.submit(folder, *arguments, options=options)
    assert job.wait_for_end() == "FAILED", job.output
    assert cluster.lab.job(job.number)["ExitCode"] == "2:0"
    assert job.restarts == 0
    assert "step 1/" not in job.output
    return "\n".join(line for line in job.output.splitlines() if "error" in line.lower())


def test_more_ranks_than_gpus_are_refused_in_the_job(cluster: Cluster, tmp_path: Path):
    text = refused(cluster, tmp_path / "run", options=["--ntasks-per-node=9", "--gres=gpu:8"])
    assert "9 ranks but 8 GPUs on a node" in text


def test_a_bad_configuration_is_refused_in_the_job_once(cluster: Cluster, tmp_path: Path):
    text = refused(cluster, tmp_path / "run", "parallel.tensor_parallel_size=3")
    assert text.count("parallel.tensor_parallel_size=3 does not divide the 4 ranks") == 1


def hide(cluster: Cluster, folder: Path) -> None:
    """Make a folder look empty on the second node only."""
    if not cluster.lab.is_isolated:
        pytest.skip("nodes share their files here: no namespaces without root")
    cluster.lab.hosts["n2"].run("mount", "-t", "tmpfs", "none", str(folder))


def show(cluster: Cluster, folder: Path) -> None:
    """Undo `hide`."""
    cluster.lab.hosts["n2"].run("umount", str(folder))


@pytest.mark.parametrize("what", ["dataset", "python", "run folder"])
def test_what_is_missing_on_one_node_is_refused_with_the_nodes_name(cluster: Cluster, tmp_path: Path, what: str):
    (tmp_path / "runs").mkdir()
    folders = {"dataset": cluster.dataset.train.parent, "python": Path(sys.prefix), "run folder": tmp_path / "runs"}
    hide(cluster, folders[what])
    try:
        text = refused(cluster, tmp_path / "runs" / "run")
    finally:
        wait_for(lambda: not cluster.lab.run("squeue", "--noheader").stdout, "an empty queue")
        show(cluster, folders[what])
    assert "error: node n2: " in text
    assert "error: node n1: " not in text
    if what != "python":  # another Python of the system may stand in for the missing one; it lacks what training needs
        assert {"dataset": str(cluster.dataset.train), "run folder": "run.folder="}[what] in text
    assert "the node named above cannot take part" in text
