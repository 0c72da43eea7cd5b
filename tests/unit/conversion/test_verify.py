"""The comparison after a conversion finds what differs, says where, and refuses it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small_dataset import documents

from deberta_xl.checkpoint.lazy import in_memory
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert, open_pretrained
from deberta_xl.conversion.verify import TOLERANCES, batch, places, stream, verify
from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig

SIZES = {"vocab_size": 420, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 48}
LAYOUTS = {
    "v2": {"conv_kernel_size": 3},
    "v1": {"share_att_key": False, "normalize_relative_table": False, "position_buckets": 0},
    "everything in the input": {"position_biased_input": True, "type_vocab_size": 2},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A small tokenizer."""
    folder = tmp_path_factory.mktemp("verify") / "tokenizer"
    train_tokenizer(documents(), 420, folder)
    return folder


def build(folder: Path, tokenizer: Path | None, layout: str = "v2") -> DebertaForMaskedLM:
    """A model and its folder."""
    model = DebertaForMaskedLM(DebertaConfig(**SIZES | LAYOUTS[layout])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, tokenizer=tokenizer)
    return model


@pytest.mark.parametrize("has_tokenizer", [True, False], ids=["text", "random ids"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_at_a_time_computes_what_the_whole_model_does(layout, has_tokenizer, tokenizer, tmp_path):
    model = build(tmp_path / "native", tokenizer if has_tokenizer else None, layout)
    source = open_pretrained(tmp_path / "native")
    *states, logits = stream(source)
    ids, labels = batch(source)
    assert 0 < int((labels > 0).sum()) < ids.numel()
    with torch.no_grad():
        whole = model(ids, labels=labels, output_hidden_states=True)
    assert len(states) == len(whole.hidden_states) == len(list(places(source))) - 1
    for piecewise, state in zip(states, whole.hidden_states, strict=True):
        assert torch.equal(piecewise, state[0])
    assert torch.equal(logits, whole.logits)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_passes_within_its_tolerance_and_every_layer_is_shown(dtype, tokenizer, tmp_path):
    build(tmp_path / "native", tokenizer)
    lines: list[str] = []
    conversion = Conversion(to="huggingface", dtype=dtype, tolerance=TOLERANCES[dtype], show=lines.append)
    convert(tmp_path / "native", tmp_path / "out", conversion)
    starts = ["tokenizer", "embeddings", "layer 1", "layer 2", "layer 3", "layer 4", "logits", "verified"]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts)


def test_rounding_beyond_the_tolerance_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    build(tmp_path / "native", tokenizer)
    conversion = Conversion(to="huggingface", dtype=torch.bfloat16, tolerance=1e-6)
    with pytest.raises(CheckpointError, match=r"differs from its source: at .* allowed: 1e-06"):
        convert(tmp_path / "native", tmp_path / "out", conversion)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("embeddings.word.weight", "embeddings"),
        ("encoder.layers.2.feed_forward.up.bias", "layer 3"),
        ("encoder.convolution.weight", "layer 1"),
        ("embeddings.position.weight", "logits"),
        ("head.norm.weight", "logits"),
    ],
)
def test_one_changed_tensor_is_noticed_where_it_is_first_used(name, where, tokenizer, tmp_path):
    build(tmp_path / "native", tokenizer)
    source = open_pretrained(tmp_path / "native")
    changed = in_memory({name: source.tensors[name].read() * 1.01}, "changed")
    other = dataclasses.replace(source, tensors=source.tensors | changed)
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="differs from its source"):
        verify(source, other, 1e-6, lines.append)
    differing = [line.split("  ")[0].strip() for line in lines[1:] if "difference 0.00e+00" not in line]
    assert differing[0] == where


def test_a_difference_that_is_not_a_number_is_refused(tokenizer, tmp_path):
    build(tmp_path / "native", tokenizer)
    source = open_pretrained(tmp_path / "native")
    broken = in_memory({"head.bias": torch.full((420,), float("nan"))}, "changed")
    with pytest.raises(CheckpointError, match="at logits by nan"):
        verify(source, dataclasses.replace(source, tensors=source.tensors | broken), 1.0, lambda _line: None)


def test_a_lost_rider_is_noticed(tokenizer, tmp_path):
    build(tmp_path / "native", tokenizer)
    source = open_pretrained(tmp_path / "native")
    rider = in_memory({"extra.qa_outputs.weight": torch.zeros(2, 32)}, "more")
    with pytest.raises(CheckpointError, match=r"qa_outputs\.weight of the source is not in the written model"):
        verify(dataclasses.replace(source, tensors=source.tensors | rider), source, 1.0, lambda _line: None)
