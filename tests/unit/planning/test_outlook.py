"""What `--check` says of a run's price, and of settings that look like a slip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_dataset import SmallDataset

from deberta_xl.base.errors import ConfigError
from deberta_xl.commands import outlook
from deberta_xl.commands.outlook import describe_disk, describe_fit, describe_work, disk_warning, print_memory, slips
from deberta_xl.commands.pretraining import PretrainingInputs, parse_arguments, read_inputs
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.parts import forward_flops, masked_lm_parts, num_parameters, trunk_parts
from deberta_xl.planning.memory import GIB
from deberta_xl.planning.outlook import FITTING

ENGINE = Path(__file__).parent.parent.parent.parent / "deepspeed_configs" / "cpu_debug.json"


def look(dataset: SmallDataset, folder: Path, *arguments: str) -> PretrainingInputs:
    """What a check finds."""
    files = [f"data.train={dataset.train}", f"run.folder={folder / 'run'}", "model.sequence_length=48"]
    options = ["--config", "debug", "--deepspeed_config", str(ENGINE), "--check"]
    return read_inputs(parse_arguments([*options, *files, *arguments]))


def test_work_and_disk_follow_from_sizes_steps_and_ranks(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(outlook, "free_bytes", lambda folder: 5 * 10**11)
    inputs = look(small_dataset, tmp_path, "--ranks", "2", "train.steps=1000", "checkpoint.keep=3")
    assert "each of 2 ranks" in describe_work(inputs.outlook)
    each = 12 * num_parameters(masked_lm_parts(inputs.architecture)) / 1e9
    assert (
        describe_disk(inputs.outlook) == f"{each:.2f} GB each, at most 4 at a time: {4 * each:.2f} GB, of 500 GB free"
    )
    everything = look(small_dataset, tmp_path, "train.steps=1000", "checkpoint.keep=0", "checkpoint.interval=300")
    assert "at most 4 at a time" in describe_disk(everything.outlook)


def test_rows_that_grow_longer_are_paid_for_at_their_length_and_take_the_memory_of_the_longest(
    small_dataset, tmp_path, caplog
):
    whole = look(small_dataset, tmp_path, "train.steps=60").outlook
    short = look(small_dataset, tmp_path, "train.steps=30", "model.sequence_length=16", "train.global_batch_size=96")
    growing = look(small_dataset, tmp_path, "train.steps=60", "train.lengths=16:0.5")
    assert growing.outlook.flops == pytest.approx(short.outlook.flops + whole.flops / 2, rel=1e-12)
    assert growing.outlook.flops < whole.flops
    assert growing.outlook.memory() == whole.memory()
    with caplog.at_level("INFO"):
        growing.print_more()
    assert "rows: steps 1 … 30 of 96 x 16 tokens; steps 31 … 60 of 32 x 48 tokens" in caplog.text


def test_rows_longer_than_the_documents_are_pointed_out(small_dataset, tmp_path):
    enough = 2 + int(TokenStore(small_dataset.train).lengths.max())
    words = (
        f"train.lengths={enough}:0.5", f"model.sequence_length={2 * enough}", "model.max_position_embeddings=4096",
        "train.steps=30", "train.global_batch_size=2", "train.micro_batch_size=1",
    )  # fmt: skip
    (told,) = slips(look(small_dataset, tmp_path, *words))
    assert f"but only 0.0 % of the dataset's tokens stand in documents longer than {enough}" in told
    assert list(slips(look(small_dataset, tmp_path, *words, "data.attend_across_documents=true"))) == []


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(small_dataset, tmp_path):
    inputs = look(small_dataset, tmp_path, "train.global_batch_size=64", "train.micro_batch_size=1")

    def needed(size: int) -> float:
        trial = replace(inputs.config, train=replace(inputs.config.train, micro_batch_size=size))
        return inputs.outlook._replace(config=trial).memory()[0].total / GIB

    device, outlook = (needed(8) + needed(16)) / 2 / FITTING, inputs.outlook
    assert outlook.largest_micro_batch(device, recomputes=False) == 8
    assert outlook.largest_micro_batch(device, recomputes=True) > 8
    assert f"GPU_MEMORY_GIB={device:g}: 8 with train.activation_checkpointing=false" in describe_fit(outlook, device)
    assert outlook.largest_micro_batch(1e-3, recomputes=True) is None


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
    assert inputs.outlook.largest_micro_batch(80.0, recomputes=False) in [2**n for n in range(40)]


def test_what_nobody_means_is_pointed_out_and_an_ordinary_run_is_not(small_dataset, tmp_path, monkeypatch):
    assert list(slips(look(small_dataset, tmp_path, "train.steps=30"))) == []
    many = look(small_dataset, tmp_path, "train.steps=1000000")
    assert f"reads its {many.data.num_rows:,} rows" in next(slips(many))
    pieces = small_dataset.tokenizer.vocab_size
    (spare,) = slips(look(small_dataset, tmp_path, "train.steps=30", "model.vocab_size=128100"))
    assert f"model.vocab_size=128100, but the tokenizer has {pieces} pieces" in spare
    mixed = ("train.steps=30", "train.objective=mixed", "train.global_batch_size=8")
    assert list(slips(look(small_dataset, tmp_path, *mixed, "train.micro_batch_size=4"))) == []
    (whole,) = slips(look(small_dataset, tmp_path, *mixed, "train.micro_batch_size=8"))
    assert "a step is one micro-batch of 8 sequences: with a smaller train.micro_batch_size" in whole
    pair = ("train.steps=30", "train.objective=replaced_tokens", "model.num_layers=3")
    (masking,) = slips(look(small_dataset, tmp_path, *pair, "data.replace_with_random=0"))
    assert "with data.max_ngram=3, data.replace_with_mask=0.8 masks for its generator as masked_lm does" in masking
    assert masking.endswith("for that set data.max_ngram=1 data.replace_with_mask=1.0")
    pair += ("data.max_ngram=1", "data.replace_with_mask=1.0", "data.replace_with_random=0.0")
    assert list(slips(look(small_dataset, tmp_path, *pair))) == []
    (deep,) = slips(look(small_dataset, tmp_path, *pair, "generator.num_layers=4"))
    assert deep.startswith("generator.num_layers=4 is more than model.num_layers=3, of the discriminator")
    (idle,) = slips(look(small_dataset, tmp_path, "train.steps=30", "train.objective=causal", "data.max_ngram=2"))
    assert idle == "train.objective=causal masks nothing: data.max_ngram has no effect"
    monkeypatch.setattr(outlook, "free_bytes", lambda folder: 10**6)
    full = disk_warning(look(small_dataset, tmp_path, "train.steps=30").outlook)
    assert "do not fit the 0.0 GB that are free" in full


OWN_OBJECTIVE = """
from torch import nn
from deberta_xl.model.trunk import Trunk
from deberta_xl.objectives.pretraining import Pretraining

class Tagger(Trunk):
    def __init__(self, config):
        super().__init__(config)
        self.tagger = nn.Linear(config.hidden_size, 5)

class Tagging(Pretraining):
    def build(self):
        return Tagger(self.architecture)

    def losses(self, model, batch, shares, key): ...
"""


def test_of_an_objective_of_ones_own_the_head_is_counted_and_its_work_is_said_to_be_left_out(
    small_dataset, tmp_path, monkeypatch, caplog
):
    (tmp_path / "taggers.py").write_text(OWN_OBJECTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    found = look(small_dataset, tmp_path, "train.objective=taggers:Tagging", "train.global_batch_size=64").outlook
    trunk = trunk_parts(found.work.architecture)
    head = 5 * (found.work.architecture.hidden_size + 1)
    assert found.work.num_parameters == num_parameters(trunk) + head
    assert found.flops == found.steps * 3 * forward_flops(trunk, found.work.example.times(64))
    with caplog.at_level("INFO"):
        print_memory(found)
    assert "memory and work leave out what is not known of: tagger" in caplog.text


def test_ranks_are_described_not_started(small_dataset, tmp_path):
    assert look(small_dataset, tmp_path, "--ranks", "2").grid.data_parallel_size == 2
    with pytest.raises(ConfigError, match="--ranks 0: at least 1"):
        look(small_dataset, tmp_path, "--ranks", "0")
    arguments = parse_arguments(["--config", "debug", "--deepspeed_config", str(ENGINE), "--ranks", "2"])
    with pytest.raises(ConfigError, match="deepspeed --num_accelerators 2"):
        read_inputs(arguments)
