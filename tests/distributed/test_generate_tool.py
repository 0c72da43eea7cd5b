"""Texts written on several ranks are those written on one."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.generation import Ranks, Writing, generate
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.prompts import GenerationError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import NativeConfig

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
    model.stated = NativeConfig(config, objective="prefix")
    small_dataset.tokenizer.save(folder / "tokenizer")
    model.save_pretrained(folder / "native", tokenizer=folder / "tokenizer")
    return folder / "native"


def call(*arguments: object) -> str:
    """What tools/generate.py prints on this rank."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import generate

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        generate.run(generate.parse_arguments(list(map(str, arguments))))
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
