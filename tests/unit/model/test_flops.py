"""The operation count against torch's own counter on the real model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deberta_xl.architecture import DebertaConfig
from deberta_xl.model.flops import forward_flops, peak_flops, step_flops
from deberta_xl.model.masked_lm import MaskedLanguageModel


@pytest.mark.parametrize(
    "options",
    [
        {"conv_kernel_size": 3},
        {"share_att_key": False},
        {"pos_att_type": "c2p"},
        {"position_biased_input": True},
        {"head_dim": 24},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_count_is_what_torch_counts(options):
    config = DebertaConfig(
        vocab_size=300, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=160, position_buckets=16,
        max_position_embeddings=40, **options,
    )  # fmt: skip
    model = MaskedLanguageModel(config).eval()
    ids = torch.arange(2 * 40).view(2, 40) + 4
    labels = torch.zeros_like(ids)
    labels[:, :6] = ids[:, :6]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=labels)
    # In each EMD pass key-side position products run again (their dropout differs); the definition counts them once.
    repeated = 0
    if config.has_position_to_content and not config.position_biased_input:
        repeated = 2 * 80 * 2 * config.relative_span * config.attention_size
    assert forward_flops(config, 2, 40, 12) == pytest.approx(counter.get_total_flops() - repeated, rel=1e-9)
    assert step_flops(config, 2, 40, 12) == 3 * forward_flops(config, 2, 40, 12)


def test_the_paper_models_cost_is_known():
    # 3 x 3.09 GFLOP per token at 512 tokens, 15 % labelled, with 16 sequences sharing the position projections.
    config = DebertaConfig(
        vocab_size=128100, hidden_size=1536, num_layers=48, num_heads=24, intermediate_size=6144, conv_kernel_size=3
    )
    tokens = 16 * 512
    assert step_flops(config, 16, 512, round(0.15 * tokens)) / tokens == pytest.approx(9.26e9, rel=0.01)


def test_a_devices_peak_is_found_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("AMD Ryzen") is None
