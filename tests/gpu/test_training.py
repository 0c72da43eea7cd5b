"""Training on one GPU, through the commands: every engine, the same bits again, the CPU's figures, memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_runs import FINETUNE, PRETRAIN, ROOT, Command, check_same, check_trained, figures, pretraining, run, stopping
from small_dataset import SmallDataset
from small_task import finetune_arguments, write_encoder, write_sentences

from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.kernels.registry import KERNELS, Demand
from deberta_xl.planning.memory import GIB
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.platform import Platform

GPU = Demand(DebertaConfig(vocab_size=8), platform=Platform("cuda", 2))
ABLE = [name for name, kernel in KERNELS.items() if kernel.refusal(GPU) is None]
"""Kernels."""
DETERMINISTIC = "train.deterministic=true"
# More than 3,072 tokens a micro-batch: torch sums the gradient of fewer words in another way.
RUN = (
    "model.sequence_length=256", "train.steps=12", "train.log_interval=1", "schedule.warmup_steps=2",
    "optimizer.learning_rate=2e-3", "checkpoint.interval=100", "evaluation.max_samples=32",
)  # fmt: skip
SHORT = (
    "model.sequence_length=64", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=4",
    "train.log_interval=1", "schedule.warmup_steps=2", "checkpoint.interval=100", "evaluation.max_samples=32",
)  # fmt: skip
LARGE = (
    "model.hidden_size=512", "model.num_layers=6", "model.num_heads=8", "model.intermediate_size=2048",
    "model.sequence_length=512", "train.steps=3", "train.global_batch_size=16", "train.micro_batch_size=16",
    "train.log_interval=1", "schedule.warmup_steps=1", "checkpoint.interval=100", "evaluation.max_samples=4",
)  # fmt: skip


def arguments(dataset: SmallDataset, folder: Path, engine: str, *overrides: str, preset: str = "debug") -> list[str]:
    """Of pretraining."""
    return pretraining(folder, dataset[:2], engine, *overrides, preset=preset)


def pretrain(*given: object, is_on_gpu: bool = True, **preset: str) -> Command:
    """The command with such arguments."""
    return Command([str(PRETRAIN), *arguments(*given, **preset)], is_on_gpu)


@pytest.mark.parametrize("engine", ["zero1_bf16", "zero3_bf16"])
@pytest.mark.parametrize("kernel", ABLE)
def test_a_run_trains_repeats_itself_and_resumes_to_the_same_bits(small_dataset, tmp_path, kernel, engine):
    settings = (*RUN, f"model.kernel={kernel}")
    if kernel == "reference":  # its gathers send gradients back by atomics otherwise
        settings += (DETERMINISTIC,)
    whole, again, parted = (tmp_path / name for name in ("whole", "again", "parted"))
    once, twice = (pretrain(small_dataset, folder, engine, *settings) for folder in (whole, again))
    first = stopping(PRETRAIN, arguments(small_dataset, parted, engine, *settings), 5)
    said, _, of_first = run(once, twice, first)
    print(f"{engine}, {kernel}: {check_trained(whole)}")
    assert f"attention: {kernel} kernel" in said
    check_same(again, whole)
    assert (parted / "STATE").read_text() == "stopped\n", of_first
    (said,) = run(pretrain(small_dataset, parted, engine, *settings))
    assert "resumed from" in said
    check_same(parted, whole)


@pytest.mark.parametrize("task", ["replaced_tokens", "causal", "sift"])
def test_every_way_to_learn_resumes_to_the_same_bits(small_dataset, tmp_path, task):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    if task == "sift":
        script = FINETUNE
        encoder = write_encoder(small_dataset, tmp_path / "encoder" / "weights")
        sentences = write_sentences(tmp_path / "sentences")
        given = [
            [*finetune_arguments(encoder, sentences, folder, "sift.weight=2", DETERMINISTIC, engine="zero1_bf16")]
            for folder in (whole, parted)
        ]
    else:
        script, preset = PRETRAIN, "v3_debug" if task == "replaced_tokens" else "debug"
        settings = (*RUN, DETERMINISTIC, f"train.objective={task}")
        given = [arguments(small_dataset, folder, "zero1_bf16", *settings, preset=preset) for folder in (whole, parted)]
    _, of_first = run(Command([str(script), *given[0]]), stopping(script, given[1], 3))
    # Of the few steps of fine-tuning an encoder that knows nothing, no more is asked than that they are finite.
    print(f"{task}: {check_trained(whole, falls_by=-1.0 if task == 'sift' else 0.1)}")
    assert (parted / "STATE").read_text() == "stopped\n", of_first
    run(Command([str(script), *given[1]]))
    check_same(parted, whole)


LAUNCHERS = {
    "zero2_bf16": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
    "fp16": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--master_port", "29871"],
    "zero3_offload": [],
}


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_other_engines_train_under_every_launcher(small_dataset, tmp_path, engine):
    given = pretrain(small_dataset, tmp_path, engine, *RUN)
    (said,) = run(Command([*LAUNCHERS[engine], *given.words]))
    print(f"{engine}: {check_trained(tmp_path)}")
    assert "NCCL version" in said


@pytest.mark.parametrize(
    ("objective", "kernel"),
    [*(("masked_lm", kernel) for kernel in ABLE), ("replaced_tokens", "auto"), ("causal", "auto")],
)
def test_the_gpu_gives_the_figures_of_the_cpu(small_dataset, tmp_path, objective, kernel):
    settings = (*SHORT, f"train.objective={objective}")
    preset = "v3_debug" if objective == "replaced_tokens" else "debug"
    folders = tmp_path / "gpu", tmp_path / "cpu"
    runs = [
        pretrain(small_dataset, folder, "cpu_debug", *settings, f"model.kernel={name}", preset=preset, is_on_gpu=on_gpu)
        for folder, name, on_gpu in zip(folders, (kernel, "auto"), (True, False), strict=True)
    ]
    run(*runs)
    gpu, cpu = map(figures, folders)
    names = [name for name in cpu[1] if name.endswith(("loss", "grad_norm"))]
    largest = {
        step: max(abs(gpu[step][name] / cpu[step][name] - 1) for name in names if cpu[step][name])
        for step in sorted(cpu)
    }
    print(f"{objective}, {kernel}: largest relative difference of {', '.join(names)} in each step: {largest}")
    # Dropout included: its masks are a function of places. What is left is the order of float32 sums, which each of
    # Adam's steps makes larger, since it divides small gradients by themselves.
    assert largest[1] < 1e-5
    assert max(largest.values()) < 1e-3


@pytest.mark.parametrize(("engine", "tolerance"), [("cpu_debug", 1e-5), ("zero3_bf16", 5e-3)])
def test_a_checkpoint_of_the_gpu_opens_on_the_cpu(small_dataset, tmp_path, engine, tolerance):
    run(pretrain(small_dataset, tmp_path, engine, *SHORT))
    words = [str(ROOT / "tools" / "evaluate.py"), str(tmp_path), str(small_dataset.valid), "--max_samples", "32"]
    fill = [str(ROOT / "tools" / "fill_mask.py"), str(tmp_path), "The [MASK] of an object is a string."]
    *said, filled = run(Command(words), Command(words, is_on_gpu=False), Command(fill, is_on_gpu=False))
    gpu, cpu = (json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in said)
    valid_loss = figures(tmp_path)[4]["valid_loss"]
    print(f"{engine}: held-out loss {valid_loss} in the run, {gpu['loss']} evaluated there, {cpu['loss']} on the CPU")
    assert filled.strip()
    assert gpu["num_labels"] == cpu["num_labels"] > 50
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5)  # both in float32
    assert valid_loss == pytest.approx(cpu["loss"], rel=tolerance)  # the run's own is in the engine's precision


@pytest.mark.parametrize("kernel", ABLE)
def test_the_memory_of_a_run_is_what_was_planned(small_dataset, tmp_path, kernel):
    given = arguments(small_dataset, tmp_path, "zero1_bf16", *LARGE, f"model.kernel={kernel}")
    run(Command([str(PRETRAIN), *given]))
    (planned,) = read_inputs(parse_arguments(given)).outlook.memory()
    measured = max(line.get("memory_gib", 0) for line in figures(tmp_path).values())
    print(f"{kernel}: {measured:.2f} GiB, planned {planned.describe()}: {measured * GIB / planned.total:.2f} times")
    # Beside what is planned there are the libraries' workspaces, some 0.1 GiB. A row's documents are planned as one;
    # `strided`, which works on them one by one, takes less.
    assert measured * GIB / planned.total < 1.25
    assert kernel == "strided" or measured * GIB / planned.total > 0.75


def test_the_preflight_of_a_job_finds_nothing_wrong(tmp_path):
    (said,) = run(Command(["-m", "deberta_xl.run.preflight", str(tmp_path)]))
    print(next(line for line in said.splitlines() if "FLOP/s" in line))
    assert "pre-flight passed" in said
