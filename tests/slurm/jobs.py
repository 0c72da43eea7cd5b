"""Training jobs of the debug preset in the lab: submitted as a user does, watched, interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from lab import Lab, wait_for
from small_dataset import SmallDataset

from deberta_xl.weights.native import find_weights_folder, read_weights

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "slurm/pretrain_1.5b.sh"
#: 2 nodes x 2 ranks: tensor parallelism inside a node, data parallelism across.
OPTIONS = ["--nodes=2", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1", "--time=30", "--parsable"]
STEPS = 24
SETTINGS = [
    "--config", "debug", "--deepspeed_config", "deepspeed_configs/cpu_debug.json", "parallel.tensor_parallel_size=2",
    "model.num_layers=2", "model.sequence_length=48", "train.global_batch_size=8", "train.micro_batch_size=2",
    f"train.steps={STEPS}", "train.log_interval=1", "schedule.warmup_steps=4", "checkpoint.interval=6",
    "evaluation.interval=12", "evaluation.max_samples=8",
]  # fmt: skip
#: One rank on each node, where their number is not what is asked.
ONE_EACH = ["--ntasks-per-node=1"]
DATA_PARALLEL = "parallel.tensor_parallel_size=1"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def make_checkout(folder: Path) -> Path:
    """A folder that looks like the repository's root, without what its owner may have put there (site.env, .venv)."""
    folder.mkdir()
    for name in ("deberta_xl", "deepspeed_configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.env"))
    return folder


class Cluster(NamedTuple):
    """The lab with what its users need."""

    lab: Lab
    checkout: Path
    dataset: SmallDataset

    def submit(
        self,
        run_folder: Path,
        *arguments: str,
        script: str = SCRIPT,
        options: list[str] | None = None,
        **variables: str,
    ) -> Job:
        """Queue a training job."""
        log = run_folder.with_suffix(".out")
        command = [*OPTIONS, f"--output={log}", *(options or []), script, *self.words(run_folder), *arguments]
        return Job(self.lab, self.queue("sbatch", *command, **variables)[-1], run_folder, log)

    def words(self, run_folder: Path) -> list[str]:
        """What the script is given."""
        data = [f"data.train={self.dataset.train}", f"data.valid={self.dataset.valid}", f"run.folder={run_folder}"]
        return [*SETTINGS, *data]

    def queue(self, *command: str, **variables: str) -> list[str]:
        """Run a command that queues jobs; their numbers."""
        answer = self.lab.run(*command, cwd=self.checkout, extra=user_environment(**variables))
        assert answer.returncode == 0, answer.stdout
        return re.findall(r"^(?:Submitted batch job )?(\d+)$", answer.stdout, re.MULTILINE)


def user_environment(**variables: str) -> dict[str, str]:
    """Where Python is, one thread per rank, no GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}


class Job(NamedTuple):
    """A queued, running or ended job."""

    lab: Lab
    number: str
    folder: Path
    log: Path

    @property
    def state(self) -> str:
        """Slurm's word for how it stands."""
        return self.lab.job(self.number).get("JobState", "")

    @property
    def restarts(self) -> int:
        """How often slurm has started it again."""
        return int(self.lab.job(self.number)["Restarts"])

    @property
    def output(self) -> str:
        """Everything it said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def run_file(self, name: str) -> str:
        """A small file of the run folder, empty when there is none."""
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""

    def last_step(self) -> int:
        """The last step that was logged."""
        lines = self.run_file("metrics.jsonl").splitlines()
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return max(steps, default=0)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step was logged; fails when the job ends before."""

        def reached() -> bool:
            assert self.state not in ENDED, f"the job is {self.state} before step {step}:\n{self.output}"
            return self.last_step() >= step

        wait_for(reached, f"step {step} of job {self.number}")

    def wait_for_text(self, text: str, count: int = 1) -> None:
        """Wait until the log holds `text` so many times."""
        wait_for(lambda: self.output.count(text) >= count, f"{text!r} in the log of job {self.number}")

    def wait_for_end(self) -> str:
        """Wait until it has ended for good; slurm's word for how."""
        wait_for(lambda: self.state in ENDED, f"the end of job {self.number}")
        return self.state

    def signal_batch(self, name: str) -> None:
        """Send the signal that slurm sends to the batch shell before the time limit."""
        self.lab.run("scancel", "--batch", f"--signal={name}", self.number)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the newest checkpoint."""
        return read_weights(find_weights_folder(self.folder))


def assert_same_weights(job: Job, reference: Job) -> None:
    """Every weight is equal, bit for bit."""
    assert_weights(job, reference.weights())


def assert_weights(job: Job, expected: dict[str, torch.Tensor]) -> None:
    """Every weight is as expected, bit for bit."""
    weights = job.weights()
    assert weights.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert not different
