"""The operation count against torch's own counter on the real models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import forward_flops, masked_lm_parts, task_parts
from deberta_xl.model.task_model import TaskModel
from deberta_xl.planning.cost import rank_hours, step_flops
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig


def small_config(**options: object) -> DebertaConfig:
    """Three layers, 40 tokens."""
    return DebertaConfig(
        vocab_size=384, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=160, position_buckets=16,
        max_position_embeddings=40, **options,
    )  # fmt: skip


IDS = torch.arange(2 * 40).view(2, 40) + 4


@pytest.mark.parametrize(
    "options",
    [
        {"conv_kernel_size": 3},
        {"share_att_key": False},
        {"pos_att_type": "c2p"},
        {"pos_att_type": "p2c"},
        {"pos_att_type": "none"},
        {"position_biased_input": True},
        {"head_dim": 24},
    ],
    ids=lambda options: " ".join(map(str, *options.items())),
)
def test_the_count_is_what_torch_counts(options):
    config = small_config(**options)
    model = MaskedLanguageModel(config).eval()
    model.use_kernel("reference")  # which makes the products of the definition
    labels = torch.zeros_like(IDS)
    labels[:, :6] = IDS[:, :6]  # of a vocabulary that needs no padding
    with FlopCounterMode(display=False) as counter:
        model(IDS, labels=LabelledPositions.of(labels))
    # In each EMD pass key-side position products run again (their dropout differs); the definition counts them once.
    repeated = 0
    if config.has_position_to_content and not config.position_biased_input:
        repeated = 2 * 80 * 2 * config.relative_span * config.attention_size
    parts, load = masked_lm_parts(config), Load(2, 40, 12)
    assert forward_flops(parts, load) == pytest.approx(counter.get_total_flops() - repeated, rel=1e-9)
    assert step_flops(parts, load) == 3 * forward_flops(parts, load)


@pytest.mark.parametrize("kind", ["classification", "token"])
def test_a_fine_tuned_models_too(kind):
    config, head = small_config(conv_kernel_size=3), HeadConfig(kind=kind, num_labels=7)
    model = TaskModel(config, head).eval()
    model.use_kernel("reference")
    with FlopCounterMode(display=False) as counter:
        model(IDS)
    assert forward_flops(task_parts(config, head), Load(2, 40)) == counter.get_total_flops()


def test_the_paper_models_cost_is_known():
    # 3 x 3.09 GFLOP per token at 512 tokens, 15 % labelled, with 16 sequences sharing the position projections.
    config = DebertaConfig(
        vocab_size=128100, hidden_size=1536, num_layers=48, num_heads=24, intermediate_size=6144, conv_kernel_size=3
    )
    load = Load(16, 512, round(0.15 * 16 * 512))
    assert step_flops(masked_lm_parts(config), load) / load.tokens == pytest.approx(9.26e9, rel=0.01)


def test_hours_are_told_for_100_teraflops():
    assert rank_hours(3.6e17) == 1
