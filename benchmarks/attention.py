"""Attention alone, forward and backward: every kernel, transformers' attention, and two packages of others for GPUs.

6 heads of 64 (with `--model xxlarge` 24), 256 buckets, reach 512; float32 on a CPU, bfloat16 on a GPU. Projections are
left out of all. Before anything is measured, each way's context and gradients are compared with the reference's in
float32, dropout off.

examples:
  python benchmarks/attention.py
  python benchmarks/attention.py --lengths 1024 2048 --tokens 2048 --dropout 0.1 --json attention.json
  python benchmarks/attention.py --model xxlarge --lengths 512 8192 --rows dense  # on a GPU
  python benchmarks/attention.py --lengths 512 --anchors transformers compiled
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.anchors import ATTENTIONS, Attention
from benchmarks.interleaved import Case, Run, Way, compare, disagreements, parse_arguments
from deberta_xl.model.disentangled_attention import DisentangledAttention
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign_config import to_huggingface_config

HEADS = {"small": 6, "xxlarge": 24}
HEAD_SIZE, BUCKETS, REACH = 64, 256, 512
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of a result's norm; a wrong sign of offsets is far above both."""


class Inputs(NamedTuple):
    """What all ways are given."""

    states: Tensor
    """Queries, keys and values at once."""
    table: Tensor
    """Both kinds of relative rows at once."""
    gradient: Tensor
    """Of the context."""


def config_of(num_heads: int, rate: float) -> DebertaConfig:
    """Of a model that has such attention."""
    return DebertaConfig(
        vocab_size=2, hidden_size=num_heads * HEAD_SIZE, num_layers=2, num_heads=num_heads, position_buckets=BUCKETS,
        max_position_embeddings=REACH, share_att_key=True, hidden_dropout=0.0, attention_dropout=rate,
    )  # fmt: skip


def inputs_of(case: Case, num_heads: int) -> Inputs:
    """The same in every call."""
    device, width = case.segments.device, num_heads * HEAD_SIZE
    generator = torch.Generator(device).manual_seed(1)
    sizes = [(*case.segments.shape, width), (2 * BUCKETS, width), (*case.segments.shape, width)]
    inputs = Inputs(*(torch.randn(size, device=device, dtype=case.dtype, generator=generator) for size in sizes))
    return inputs._replace(states=inputs.states.requires_grad_(), table=inputs.table.requires_grad_())


def kernel_attention(kernel: str, config: DebertaConfig, case: Case) -> Attention:
    """Of a kernel of ours."""
    model = MaskedLanguageModel(config).to(case.segments.device, case.dtype).train()
    model.use_kernel(kernel)
    attention: DisentangledAttention = model.encoder.layers[0].attention
    for name in ("query_proj", "key_proj", "value_proj", "out_proj"):
        setattr(attention, name, nn.Identity())

    def attend(states: Tensor, table: Tensor) -> Tensor:
        scene = model.scene(case.segments, case.segments, DropoutKey(1), table)
        return attention(attention.ask(states), attention.memorize(states), scene)

    return attend


def forward_and_backward(attend: Attention, inputs: Inputs) -> Run:
    """Context, and gradients of states and table."""

    def run() -> tuple[Tensor, ...]:
        context = attend(inputs.states, inputs.table)
        gradients = torch.autograd.grad(context, (inputs.states, inputs.table), inputs.gradient)
        return context.detach(), *gradients

    return run


def ways_of(case: Case, options: argparse.Namespace) -> list[Way]:
    """Transformers first."""
    num_heads = HEADS[options.model]
    ours = config_of(num_heads, case.rate)
    theirs = DebertaV2Config(**to_huggingface_config(ours))
    inputs = inputs_of(case, num_heads)

    def anchor(name: str) -> Way:
        return Way(name, lambda: forward_and_backward(ATTENTIONS[name](theirs, case), inputs))

    def kernel(name: str) -> Way:
        return Way(name, lambda: forward_and_backward(kernel_attention(name, ours, case), inputs))

    return [*map(anchor, options.anchors), *map(kernel, options.kernels)]


def check(case: Case, options: argparse.Namespace) -> dict[str, Exception]:
    """The ways that compute something else than the reference does in float32."""
    num_heads = HEADS[options.model]
    inputs = Inputs(*(tensor.detach().float() for tensor in inputs_of(case, num_heads)))
    inputs = inputs._replace(states=inputs.states.requires_grad_(), table=inputs.table.requires_grad_())
    expected = forward_and_backward(kernel_attention("reference", config_of(num_heads, 0.0), case), inputs)()
    return disagreements(ways_of(case, options), expected, TOLERANCES[case.dtype])


if __name__ == "__main__":
    sys.exit(compare(parse_arguments(__doc__), ways_of, check))
