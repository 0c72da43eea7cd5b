"""What `--check` says of a run's price, and of settings that look like a slip."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from small_dataset import SmallDataset

from deberta_xl import outlook
from deberta_xl.commands.pretraining import PretrainingInputs, parse_arguments, read_inputs
from deberta_xl.errors import ConfigError
from deberta_xl.model.parameter_shapes import parameter_shapes
from deberta_xl.outlook import describe_disk, describe_fit, describe_work, largest_micro_batch, read_gibibytes, warnings
from deberta_xl.parallel.memory import GIB, estimate_memory

ENGINE = Path(__file__).parent.parent.parent / "deepspeed_configs" / "cpu_debug.json"


def look(dataset: SmallDataset, folder: Path, *arguments: str) -> PretrainingInputs:
    """What a check finds."""
    files = [f"data.train={dataset.train}", f"run.folder={folder / 'run'}", "model.sequence_length=48"]
    options = ["--config", "debug", "--deepspeed_config", str(ENGINE), "--check"]
    return read_inputs(parse_arguments([*options, *files, *arguments]))


def test_work_and_disk_follow_from_sizes_steps_and_ranks(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(outlook, "free_bytes", lambda folder: 5 * 10**11)
    inputs = look(small_dataset, tmp_path, "--ranks", "2", "train.steps=1000", "checkpoint.keep=3")
    assert "each of 2 ranks" in describe_work(inputs)
    parameters = sum(map(math.prod, parameter_shapes(inputs.architecture).values()))
    each = 12 * parameters / 1e9
    assert describe_disk(inputs) == f"{each:.2f} GB each, at most 4 at a time: {4 * each:.2f} GB, of 500 GB free"
    everything = look(small_dataset, tmp_path, "train.steps=1000", "checkpoint.keep=0", "checkpoint.interval=300")
    assert "at most 4 at a time" in describe_disk(everything)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(small_dataset, tmp_path):
    inputs = look(small_dataset, tmp_path, "train.global_batch_size=64", "train.micro_batch_size=1")

    def needed(size: int) -> float:
        trial = replace(inputs.config, train=replace(inputs.config.train, micro_batch_size=size))
        return estimate_memory(inputs.architecture, trial, inputs.engine, inputs.grid, inputs.split).total / GIB

    device = 1.05 * needed(8) / outlook.FITTING
    assert largest_micro_batch(inputs, device, recomputes=False) == 8
    assert largest_micro_batch(inputs, device, recomputes=True) > 8
    assert f"GPU_MEMORY_GIB={device:g}: 8 with train.activation_checkpointing=false" in describe_fit(inputs, device)
    assert largest_micro_batch(inputs, 1e-3, recomputes=True) is None


@pytest.mark.parametrize("text", ["", "80GB", "nan", "inf", "-1", "0"])
def test_a_device_without_a_size_is_refused(text):
    with pytest.raises(ConfigError, match="GPU_MEMORY_GIB"):
        read_gibibytes(text)


def test_a_device_without_a_size_is_refused_with_the_inputs_and_an_empty_one_is_unset(
    small_dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("GPU_MEMORY_GIB", "80GB")
    with pytest.raises(ConfigError, match="GPU_MEMORY_GIB='80GB' is not a number of GiB"):
        look(small_dataset, tmp_path)
    monkeypatch.setenv("GPU_MEMORY_GIB", "")
    look(small_dataset, tmp_path)


def test_a_batch_of_billions_is_no_work_to_divide(small_dataset, tmp_path):
    inputs = look(small_dataset, tmp_path, f"train.global_batch_size={2**40}", "train.micro_batch_size=1")
    assert largest_micro_batch(inputs, 80.0, recomputes=False) in [2**n for n in range(40)]


def test_what_nobody_means_is_pointed_out_and_an_ordinary_run_is_not(small_dataset, tmp_path, monkeypatch):
    assert list(warnings(look(small_dataset, tmp_path, "train.steps=30"))) == []
    many = look(small_dataset, tmp_path, "train.steps=1000000")
    assert f"reads its {many.data.num_rows:,} rows" in next(warnings(many))
    pieces = small_dataset.tokenizer.vocab_size
    (spare,) = warnings(look(small_dataset, tmp_path, "train.steps=30", "model.vocab_size=128100"))
    assert f"model.vocab_size=128100, but the tokenizer has {pieces} pieces" in spare
    monkeypatch.setattr(outlook, "free_bytes", lambda folder: 10**6)
    (full,) = warnings(look(small_dataset, tmp_path, "train.steps=30"))
    assert "do not fit the 0.0 GB that are free" in full


def test_ranks_are_described_not_started(small_dataset, tmp_path):
    assert look(small_dataset, tmp_path, "--ranks", "2").grid.data_parallel_size == 2
    with pytest.raises(ConfigError, match="--ranks 0: at least 1"):
        look(small_dataset, tmp_path, "--ranks", "0")
    arguments = parse_arguments(["--config", "debug", "--deepspeed_config", str(ENGINE), "--ranks", "2"])
    with pytest.raises(ConfigError, match="deepspeed --num_accelerators 2"):
        read_inputs(arguments)
