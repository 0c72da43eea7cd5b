"""Pretraining goes on from a converted checkpoint under every layout: the first losses are those of the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_dataset import SmallDataset
from test_pretrain_command import arguments, final_weights, metrics, pretrain, train_in_process

from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig

# v1's architecture, so that its fused projections are taken apart on the way into the run.
V1 = {"share_att_key": False, "normalize_relative_table": False, "position_buckets": 0, "conv_kernel_size": 0}
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 48}
SETTINGS = [
    *(f"model.{name}={str(value).lower()}" for name, value in (V1 | SIZES).items()),
    "model.dropout=0", "train.steps=3", "evaluation.interval=10",
]  # fmt: skip
STARTS = {
    "Hugging Face v1, tensor parallelism 2": ("huggingface", "cpu_debug", ["parallel.tensor_parallel_size=2"]),
    "Microsoft v1, ZeRO-3": ("microsoft", "zero3_fp32", []),
    "Hugging Face v1, ZeRO-3, tensor parallelism 2": ("huggingface", "zero3_fp32", ["parallel.tensor_parallel_size=2"]),
    "native, ZeRO-1": ("native", "cpu_debug", []),
    "Microsoft v1, two pipeline stages": ("microsoft", "cpu_debug", ["parallel.pipeline_parallel_size=2"]),
}

MORE = ("Microsoft v1, ZeRO-3", "Hugging Face v1, ZeRO-3, tensor parallelism 2", "native, ZeRO-1")
FULL = [pytest.mark.full]


@pytest.fixture(scope="module")
def folders(small_dataset: SmallDataset, tmp_path_factory) -> Path:
    """A random model in every layout, and what a single rank makes of it in `plain`."""
    folder = tmp_path_factory.mktemp("converted")
    vocab_size = small_dataset.tokenizer.vocab_size
    model = DebertaForMaskedLM(DebertaConfig(vocab_size=vocab_size, **SIZES, **V1), seed=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        for layer in model.encoder.layers:  # which v1 does not have
            layer.attention.key_proj.bias.zero_()
            layer.attention.pos_key_proj.bias.zero_()
    model.save_pretrained(folder / "native")
    convert(folder / "native", folder / "huggingface", Conversion(to="huggingface"))
    convert(folder / "huggingface", folder / "microsoft", Conversion(to="microsoft"))
    assert "in_proj" in str(sorted(torch.load(folder / "microsoft" / "pytorch_model.bin", weights_only=True)))
    pretrain(small_dataset, folder / "plain", *SETTINGS, f"train.init={folder / 'native'}")
    return folder


@pytest.mark.parametrize("start", [pytest.param(name, marks=FULL * (name in MORE)) for name in STARTS])
def test_every_layout_trains_on_as_one_rank_does_from_the_source(start, folders, small_dataset, tmp_path):
    kind, engine, overrides = STARTS[start]
    settings = [*SETTINGS, *overrides, f"train.init={folders / kind}"]
    given = arguments(small_dataset, tmp_path / "run", *settings, engine=engine)
    assert run_ranks(train_in_process, 2, given, backend=None) == ["done"] * 2
    for name in ("loss", "grad_norm"):
        here, plain = metrics(tmp_path / "run", name), metrics(folders / "plain", name)
        assert len(plain) == 3
        # float32 sums over ranks come in another order.
        assert here == pytest.approx(plain, rel=1e-5)
    expected = final_weights(folders / "plain")
    assert all(
        (weight - expected[name]).abs().max() <= 1e-5 for name, weight in final_weights(tmp_path / "run").items()
    )


def test_the_model_card_of_a_run_states_its_data_arguments_and_metrics(folders, tmp_path):
    convert(folders / "plain", tmp_path / "exported", Conversion(to="huggingface", with_card=True))
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "# plain\n" in card
    assert "Not recorded" not in card
    for fact in ("| dataset fingerprint | ", "| steps | 3 |", "| sequences seen | 24 |", "| train.seed | "):
        assert fact in card
    loss = metrics(folders / "plain", "loss")[3]
    assert f"| loss | {loss:.4g} |" in card
    assert str(folders) not in card  # the paths of the machine are nobody's business
