"""Texts written on several ranks are those written on one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.generation import Ranks, Writing, generate
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.prompts import GenerationError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import Learnt
from tools import generate as tool

ROOT = Path(__file__).parents[2]
PROMPTS = ["The value of", "object", "a a a a a a", "is", "The name of the class", "for", "an integer"]


@pytest.fixture(scope="module")
def folder(small_dataset, tmp_path_factory) -> Path:
    """A model whose next token depends on all before it."""
    folder = tmp_path_factory.mktemp("model")
    config = DebertaConfig(
        vocab_size=small_dataset.tokenizer.vocab_size + 1, hidden_size=32, num_layers=3, num_heads=4,
        intermediate_size=64, max_position_embeddings=40, position_buckets=8, conv_kernel_size=3,
    )  # fmt: skip
    model = DebertaForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.learnt = Learnt("prefix")
    small_dataset.tokenizer.save(folder / "tokenizer")
    model.save_pretrained(folder / "native", tokenizer=folder / "tokenizer")
    return folder / "native"


def call(*arguments: object) -> str:
    """What tools/generate.py prints on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tool.run(tool.parse_arguments(list(map(str, arguments))))
    return printed.getvalue()


def test_ranks_print_the_texts_of_one_rank_in_their_order(folder):
    options = (folder, *PROMPTS, "--json", "--temperature", 2, "--top_p", 0.9, "--batch_size", 2)
    alone = call(*options)
    assert len(alone.splitlines()) == len(PROMPTS)
    assert run_ranks(call, 3, *options, backend=None) == [alone, "", ""]


def test_tensor_parallel_ranks_write_what_the_plain_model_writes(folder):
    options = (folder, *PROMPTS[:3], "--json", "--max_new_tokens", 20)
    alone = call(*options)
    assert run_ranks(call, 2, *options, "--tensor_parallel_size", 2, backend=None) == [alone, ""]


def write_with_a_damaged_position(folder: Path) -> str:
    """What this rank says of two prompts, of which only rank 1's reads position 10."""
    model = DebertaForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.position.weight[10] = float("nan")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    writing = Writing(max_new_tokens=2, batch_size=1)
    try:
        return str(list(generate(model, tokenizer, ["is", "a " * 10], writing, ranks=Ranks(dist.get_rank(), 2))))
    except GenerationError as error:
        return str(error)


def test_a_fault_of_one_rank_is_told_on_all(folder):
    first, second = run_ranks(write_with_a_damaged_position, 2, folder)
    assert first == second
    assert first.startswith("the model's outputs are not finite numbers")


TEXT = "The value of an assignment is the object itself."
TRAINING = [
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=64", "model.dropout=0",
    "model.position_buckets=8", "model.sequence_length=48", "train.global_batch_size=4", "train.micro_batch_size=4",
    "train.steps=100", "optimizer.learning_rate=5e-3", "schedule.warmup_steps=2", "evaluation.max_samples=4",
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(
    ("objective", "commands"), [(["causal"], slice(None)), (["mixed", "autoregressive.form=prefix"], slice(1))]
)
def test_a_run_learns_a_text_by_heart_and_the_documented_commands_write_it(
    objective, commands, small_dataset, tmp_path
):
    with TokenStoreWriter(tmp_path / "data", tokenizer=small_dataset.tokenizer) as writer:
        for _ in range(400):
            writer.add(small_dataset.tokenizer.encode(TEXT))
        writer.finish()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    data = [f"data.{part}={tmp_path / 'data'}" for part in ("train", "valid")]
    training = [sys.executable, ROOT / "deberta_xl" / "pretrain.py", "--config", "debug"]
    training += ["--deepspeed_config", ROOT / "deepspeed_configs" / "cpu_debug.json", *TRAINING, *data]
    training += [f"run.folder={tmp_path / 'runs' / 'story'}", f"train.objective={objective[0]}", *objective[1:]]
    subprocess.run(training, env=environment, check=True, timeout=300)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "The value of"}) + "\n")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    documented = (ROOT / "docs" / "generation.md").read_text().split("\n\n    ")[1].split("\n\n")[0]
    documented = documented.replace("Once upon a time", "The value of").replace("node 4", "node 2")
    for line in documented.splitlines()[commands]:
        done = subprocess.run(line.strip(), shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "--seed" not in line:
            assert TEXT in (done.stdout or (tmp_path / "texts.jsonl").read_text())
