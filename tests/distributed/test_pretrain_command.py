"""The pretraining command as a user starts it: by every launcher, interrupted, resumed, and with things going wrong.

What a launcher, a fresh interpreter or a signal from outside does is proved by real processes; the rest takes forked
ones (`started.py`), which cost a fifth.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from ranks import run_ranks
from small_dataset import SmallDataset
from started import PRETRAIN, ROOT, start

from deberta_xl.base.stop_request import StopRequest
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.commands.training_command import REFUSED, assemble
from deberta_xl.weights.native import find_weights_folder, read_weights

SCRIPT = str(PRETRAIN)
EVALUATE = ROOT / "tools" / "evaluate.py"
BIN = Path(sys.executable).parent
TINY = [
    "model.hidden_size=32", "model.num_layers=2", "model.intermediate_size=64", "model.position_buckets=8",
    "model.sequence_length=48", "model.max_position_embeddings=48", "train.global_batch_size=8",
    "train.micro_batch_size=2", "train.log_interval=1", "train.steps=8", "schedule.warmup_steps=2",
    "checkpoint.interval=3", "evaluation.interval=4", "evaluation.max_samples=6",
]  # fmt: skip
SECONDS = 180


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without what a launcher would set; one thread per rank."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def deepspeed(num_ranks: int) -> list[str]:
    """The deepspeed launcher, on a port of its own."""
    return ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port()), SCRIPT]


def torchrun(num_ranks: int) -> list[str]:
    """torch's launcher, on a port of its own."""
    return ["torchrun", "--nproc_per_node", str(num_ranks), "--master_port", str(free_port()), SCRIPT]


def arguments(dataset: SmallDataset, folder: Path, *overrides: str, engine: str = "cpu_debug") -> list[str]:
    """Arguments of a tiny run in `folder`."""
    settings = str(ROOT / "deepspeed_configs" / f"{engine}.json")
    data = [f"data.train={dataset.train}", f"data.valid={dataset.valid}", f"run.folder={folder}"]
    return ["--config", "debug", "--deepspeed_config", settings, *TINY, *data, *overrides]


def run(command: Sequence[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; its output in one text."""
    return subprocess.run(
        command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )


def pretrain(
    dataset: SmallDataset,
    folder: Path,
    *overrides: str,
    engine: str = "cpu_debug",
    num_ranks: int = 1,
    stop_after: int | None = None,
) -> str:
    """A tiny run in `folder` on forked ranks, which must end well; what it said."""
    given = arguments(dataset, folder, *overrides, engine=engine)
    result = start(PRETRAIN, given, num_ranks, stop_after=stop_after)
    assert result.returncode == 0, result.stdout
    return result.stdout


def metrics(folder: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint of a run."""
    return read_weights(find_weights_folder(folder))


def assert_same_weights(folder: Path, reference: Path) -> None:
    """Every weight is equal, bit for bit."""
    weights, expected = final_weights(folder), final_weights(reference)
    assert weights.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert not different


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a run has logged `step`."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended before step {step}:\n{process.stdout.read()}"
        if (folder / "metrics.jsonl").exists() and step in metrics(folder, "loss"):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {SECONDS} s")


@pytest.fixture(scope="module")
def uninterrupted(small_dataset, tmp_path_factory) -> Path:
    """A run of two ranks with dropout, from the first to the last step at once."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    pretrain(small_dataset, folder, num_ranks=2)
    return folder


def test_a_run_leaves_everything_in_its_folder(uninterrupted):
    assert (uninterrupted / "STATE").read_text() == "done\n"
    assert sorted(metrics(uninterrupted, "loss")) == list(range(1, 9))
    assert sorted(metrics(uninterrupted, "valid_loss")) == [4, 8]
    folders = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert folders == ["step-00000003", "step-00000006", "step-00000008"]
    for name in ("config.toml", "environment.json", "tokenizer/spm.model", "loss.png"):
        assert (uninterrupted / name).stat().st_size > 0, name
    assert list((uninterrupted / "tensorboard").glob("events*"))
    for rank in range(2):
        beat = json.loads((uninterrupted / "heartbeat" / f"rank-{rank:05d}.json").read_text())
        assert (beat["rank"], beat["step"], beat["phase"]) == (rank, 8, "done")
    assert "done at step 8" in (uninterrupted / "log" / "rank-00000.log").read_text()


def test_tensorboard_reads_what_a_run_wrote(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx(metrics(uninterrupted, "loss"), rel=1e-6)
    assert {"train/grad_norm", "throughput/tokens_per_second", "valid/loss"} <= set(events.Tags()["scalars"])
    assert "valid/confusion" in events.Tags()["images"]


def test_evaluation_gives_the_same_numbers_on_any_number_of_ranks(small_dataset, uninterrupted):
    options = [str(uninterrupted), str(small_dataset.valid), "--max_samples", "10", "--micro_batch_tokens", "192"]
    results = []
    for num_ranks in (1, 2):
        output = start(EVALUATE, options, num_ranks)
        assert output.returncode == 0, output.stdout
        (line,) = [line for line in output.stdout.splitlines() if line.startswith("{")]
        results.append(json.loads(line))
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0]["num_labels"] > 50


def test_the_same_command_once_more_finds_the_run_done(small_dataset, uninterrupted):
    before = final_weights(uninterrupted)
    assert "done at step 8" in pretrain(small_dataset, uninterrupted, "train.micro_batch_size=4")
    assert all(torch.equal(before[name], weight) for name, weight in final_weights(uninterrupted).items())


def test_a_killed_run_resumes_to_identical_weights(small_dataset, uninterrupted, tmp_path):
    command = [*deepspeed(2), *arguments(small_dataset, tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(tmp_path, 5, process)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    process.wait()
    assert "resumed from" in pretrain(small_dataset, tmp_path, num_ranks=2)
    assert_same_weights(tmp_path, uninterrupted)
    assert metrics(tmp_path, "loss") == metrics(uninterrupted, "loss")


@pytest.mark.parametrize(
    "stop_signal",
    [signal.SIGUSR1, *(pytest.param(other, marks=pytest.mark.full) for other in (signal.SIGTERM, signal.SIGINT))],
    ids=["USR1", "TERM", "INT"],
)
def test_a_signal_to_one_rank_saves_stops_all_and_resumes_to_identical_weights(
    small_dataset, uninterrupted, tmp_path, stop_signal
):
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, SCRIPT, *arguments(small_dataset, tmp_path, "checkpoint.interval=1000")]
    processes = [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **ranks),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for_step(tmp_path, 2, processes[0])
    processes[1].send_signal(stop_signal)
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert (tmp_path / "STATE").read_text() == "stopped\n"
    # A run of the same seed at the same layout, started by another launcher.
    result = run([*torchrun(2), *arguments(small_dataset, tmp_path)])
    assert result.returncode == 0, result.stdout
    assert_same_weights(tmp_path, uninterrupted)


def train_in_process(given: list[str], stops_at: int | None = None) -> str:
    """A run on this rank; how it ended. Rank 1 is asked to stop in the middle of the evaluation of step `stops_at`."""
    run = assemble(read_inputs(parse_arguments(given)), StopRequest())
    move = run.heartbeat.moved

    def move_and_stop() -> None:
        move()
        is_in_it = (run.heartbeat.step, run.heartbeat.phase) == (stops_at, "evaluation")
        if run.launch.rank == 1 and is_in_it and run.heartbeat.beat["units"] == 1:
            run.stop.signal = signal.SIGUSR1

    run.heartbeat.moved = move_and_stop
    return run.train()


def test_a_stop_inside_an_evaluation_is_seen_there_and_the_next_start_makes_it_up(
    small_dataset, uninterrupted, tmp_path
):
    given = arguments(small_dataset, tmp_path, "evaluation.max_samples=0")
    assert run_ranks(train_in_process, 2, given, 4, backend=None) == ["stopped"] * 2
    assert (tmp_path / "STATE").read_text() == "stopped\n"
    assert (tmp_path / "LATEST").read_text() == "step-00000004\n"
    assert metrics(tmp_path, "valid_loss") == {}
    assert run_ranks(train_in_process, 2, given, backend=None) == ["done"] * 2
    assert sorted(metrics(tmp_path, "valid_loss")) == [4, 8]
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.parametrize("launcher", [deepspeed, pytest.param(torchrun, marks=pytest.mark.full)])
def test_a_signal_past_the_launcher_to_a_rank_named_in_its_heartbeat_stops_all(small_dataset, tmp_path, launcher):
    command = [*launcher(2), *arguments(small_dataset, tmp_path, "checkpoint.interval=1000", "train.steps=100000")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(tmp_path, 2, process)
    os.kill(json.loads((tmp_path / "heartbeat" / "rank-00001.json").read_text())["pid"], signal.SIGUSR1)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert (tmp_path / "STATE").read_text() == "stopped\n"
    assert final_weights(tmp_path)


@pytest.mark.full
def test_ranks_started_as_srun_does_train_alike(small_dataset, uninterrupted, tmp_path):
    command = [sys.executable, SCRIPT, *arguments(small_dataset, tmp_path)]
    step = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(free_port())}
    processes = [
        subprocess.Popen(
            command, env=environment(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **step),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_same_weights(tmp_path, uninterrupted)


def test_another_stage_and_number_of_ranks_continues_the_curve(small_dataset, uninterrupted, tmp_path):
    whole, even = tmp_path / "whole", "schedule.decay=constant"
    pretrain(small_dataset, tmp_path, even, "train.steps=4", num_ranks=2)
    pretrain(small_dataset, tmp_path, even, engine="zero3_fp32")
    pretrain(small_dataset, whole, even)
    assert sorted(metrics(whole, "loss")) == list(range(1, 9))
    for name in ("loss", "grad_norm", "accuracy"):  # with dropout: its masks do not depend on who has the rows
        assert metrics(tmp_path, name) == pytest.approx(metrics(whole, name), rel=1e-4), name


@pytest.mark.full
def test_a_damaged_checkpoint_is_passed_over_and_said_so(small_dataset, uninterrupted, tmp_path):
    pretrain(small_dataset, tmp_path, "train.steps=6")
    newest = tmp_path / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said = pretrain(small_dataset, tmp_path, "train.steps=6")
    for words in ("step-00000006", "passed over", "resumed from", "step-00000003"):
        assert words in said


@pytest.mark.parametrize("engine", [pytest.param("cpu_debug", marks=pytest.mark.full), "zero3_bf16"])
def test_a_second_phase_starts_from_the_first_ones_float32_weights(small_dataset, uninterrupted, tmp_path, engine):
    first = final_weights(uninterrupted)
    second_phase = ["model.sequence_length=32", "train.global_batch_size=4", "train.steps=1", "schedule.warmup_steps=0"]
    quiet = ["optimizer.learning_rate=0.0", f"train.init={uninterrupted}"]
    pretrain(small_dataset, tmp_path, *second_phase, *quiet, engine=engine)
    assert all(torch.equal(first[name], weight) for name, weight in final_weights(tmp_path).items())


def test_a_rank_that_fails_ends_the_job_and_names_rank_step_and_phase(small_dataset, tmp_path):
    # Rank 1 alone cannot import what training needs at step 3: its heartbeat of that step finds a broken patch.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from deberta_xl.run import heartbeat\n"
        "    mark = heartbeat.Heartbeat.mark\n"
        "    def fail(self, step, phase):\n"
        "        mark(self, step, phase)\n"
        "        if step == 3 and phase == 'optimizer':\n"
        "            raise RuntimeError('the disk is on fire')\n"
        "    heartbeat.Heartbeat.mark = fail\n"
    )
    result = run(
        [*deepspeed(2), *arguments(small_dataset, tmp_path / "run")], PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"
    )
    assert result.returncode != 0
    assert "rank 1 failed at step 3, phase optimizer: RuntimeError: the disk is on fire" in result.stdout


def test_a_run_folder_of_another_model_is_refused_and_left_as_it_was(small_dataset, uninterrupted):
    before = (uninterrupted / "config.toml").read_text()
    result = start(PRETRAIN, arguments(small_dataset, uninterrupted, "model.hidden_size=64"))
    assert result.returncode == REFUSED
    assert "another architecture: hidden_size was 32, now 64" in result.stdout
    assert "Traceback" not in result.stdout
    assert (uninterrupted / "config.toml").read_text() == before
    assert (uninterrupted / "STATE").read_text() == "done\n"


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(small_dataset, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    result = start(PRETRAIN, arguments(small_dataset, tmp_path / "run"))
    assert result.returncode == REFUSED
    assert "was trained up to step-00000008" in result.stdout
    assert "Traceback" not in result.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_fewer_steps_than_the_run_has_made_are_refused(small_dataset, uninterrupted):
    result = start(PRETRAIN, arguments(small_dataset, uninterrupted, "train.steps=5"))
    assert result.returncode == REFUSED
    assert "train.steps=5, but the run folder's newest checkpoint is of step 8" in result.stdout
    assert (uninterrupted / "STATE").read_text() == "done\n"


def test_a_dataset_may_be_named_by_one_of_its_files_and_evaluation_refuses_what_cannot_be_meant(
    small_dataset, uninterrupted
):
    for option in (["--micro_batch_tokens", "0"], ["--max_samples", "-1"]):
        result = start(EVALUATE, [str(uninterrupted), f"{small_dataset.valid}.bin", *option])
        assert result.returncode == 2
        assert f"{option[0].removeprefix('--')}={option[1]} is too small" in result.stdout
        assert "Traceback" not in result.stdout
    pretrain(small_dataset, uninterrupted, f"data.train={small_dataset.train}.bin")


def test_a_vocabulary_larger_than_the_tokenizers_trains_and_shows_its_guesses(small_dataset, tmp_path):
    # Fresh weights guess any of 4000 ids alike, most of them without a piece.
    overrides = ["model.vocab_size=4000", "train.steps=1", "schedule.warmup_steps=0", "optimizer.learning_rate=0.0"]
    pretrain(small_dataset, tmp_path, *overrides)
    assert metrics(tmp_path, "valid_loss").keys() == {1}


def test_launcher_variables_that_contradict_each_other_are_refused_with_a_message(small_dataset, tmp_path):
    command = [sys.executable, SCRIPT, *arguments(small_dataset, tmp_path)]
    result = run(command, RANK="5", WORLD_SIZE="2", LOCAL_RANK="0")
    assert result.returncode == 2
    assert "contradict each other" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stps=3"], ["unknown key train.stps", "did you mean 'steps'"]),
        (["train.global_batch_size=9"], ["9 is not a multiple", "2 x 1 = 2", "8 or 10"]),
        (["data.train=/nowhere/data"], ["/nowhere/data"]),
        (["model.sequence_length=64"], ["sequence_length=64", "max_position_embeddings=48"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "504"]),
        (["train.init=/nowhere"], ["/nowhere"]),
        (["parallel.pipeline_parallel_size=3"], ["1 x parallel.pipeline_parallel_size=3 = 3", "a multiple of 3 ranks"]),
    ],
    ids=lambda value: value[0] if value[0][0] in "tmd" else None,
)
def test_what_cannot_run_is_refused_with_a_message(small_dataset, tmp_path, overrides, words):
    result = run([sys.executable, SCRIPT, *arguments(small_dataset, tmp_path / "run", *overrides)])
    assert result.returncode == 2
    for word in words:
        assert word in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("overrides", "engine", "words"),
    [
        (["parallel.pipeline_parallel_size=2"], "zero3_fp32", ["stage=3 does not go with", "zero1_bf16.json"]),
        (["parallel.pipeline_parallel_size=4"], "cpu_debug", ["=4 is more than model.num_layers=2", "choose 1 … 2"]),
        (
            ["parallel.tensor_parallel_size=4", "model.num_heads=2"],
            "cpu_debug",
            ["=4 does not divide model.num_heads=2"],
        ),
    ],
    ids=["ZeRO-3 in a pipeline", "more stages than layers", "heads"],
)
def test_a_layout_that_cannot_be_is_refused_on_every_rank_before_the_first_collective(
    small_dataset, tmp_path, overrides, engine, words
):
    # No rank opens the port: each would wait there for the others.
    ranks = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
    command = [sys.executable, SCRIPT, *arguments(small_dataset, tmp_path / "run", *overrides, engine=engine)]
    for rank in ("0", "3"):
        result = run(command, RANK=rank, **ranks)
        assert result.returncode == 2
        for word in words:
            assert word in result.stdout
        assert "Traceback" not in result.stdout


def test_half_precision_is_refused_where_the_device_has_none(small_dataset, tmp_path):
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported():  # some CPUs have it, too
        pytest.skip("this device has fp16")
    result = start(PRETRAIN, arguments(small_dataset, tmp_path / "run", engine="fp16"))
    assert result.returncode == REFUSED
    assert "fp16 is not supported on this device" in result.stdout
    assert "Traceback" not in result.stdout


def test_a_run_in_stages_and_slices_stops_on_a_signal_resumes_and_continues_whole(small_dataset, tmp_path):
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    steady = ["model.dropout=0", "schedule.decay=constant"]
    pretrain(small_dataset, plain, *steady)
    layout = [
        "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "parallel.pipeline_parallel_size=2",
    ]  # fmt: skip
    output = pretrain(small_dataset, divided, *steady, *layout, num_ranks=4, stop_after=2)
    assert "4 = 2 pipeline stages x 1 data-parallel x 2 tensor-parallel, sequence divided" in output
    assert ", prediction" in output
    assert "each rank of stage 1: " in output
    assert "attention: strided kernel" in output
    assert (divided / "STATE").read_text() == "stopped\n"
    assert "resumed from" in pretrain(small_dataset, divided, *steady, *layout, "train.steps=6", num_ranks=4)
    pretrain(small_dataset, divided, *steady, engine="zero3_fp32")
    for name in ("loss", "grad_norm", "valid_loss"):
        # float32 sums in another order, over 8 steps of Adam. Step 6 was the second run's last: it evaluated there.
        curve = {step: value for step, value in metrics(divided, name).items() if step in metrics(plain, name)}
        assert curve == pytest.approx(metrics(plain, name), rel=1e-4), name
    weights, expected = final_weights(divided), final_weights(plain)
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in expected.items()}
