"""Attention alone, forward and backward: every kernel, and transformers' eager attention.

6 heads of 64, 256 buckets, reach 512; float32 on a CPU, bfloat16 on a GPU. Projections are left out of both.

examples:
  python benchmarks/attention.py
  python benchmarks/attention.py --lengths 1024 2048 --tokens 2048 --dropout 0.1 --json attention.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaved import Way, compare, parse_arguments
from deberta_xl.model.disentangled_attention import DisentangledAttention
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig

HEADS, HEAD_SIZE, BUCKETS, REACH = 6, 64, 256, 512
PROJECTIONS = ("query_proj", "key_proj", "value_proj")


def pass_through(attention: nn.Module, *names: str) -> None:
    """Leave projections out: the states are queries, keys and values, the table is both kinds of rows."""
    for name in names:
        setattr(attention, name, nn.Identity())


def kernel_pass(kernel: str, hidden: Tensor, table: Tensor, segments: Tensor, rate: float) -> Callable[[], None]:
    """Forward and backward of a kernel."""
    config = DebertaConfig(
        vocab_size=2, hidden_size=HEADS * HEAD_SIZE, num_layers=2, num_heads=HEADS, position_buckets=BUCKETS,
        max_position_embeddings=REACH, share_att_key=True, hidden_dropout=0.0, attention_dropout=rate,
    )  # fmt: skip
    model = MaskedLanguageModel(config).train()
    model.use_kernel(kernel)
    attention: DisentangledAttention = model.encoder.layers[0].attention
    pass_through(attention, *PROJECTIONS, "out_proj")

    def run() -> None:
        scene = model.scene(segments, segments, DropoutKey(1), table)
        attention(attention.ask(hidden), attention.memorize(hidden), scene).sum().backward()

    return run


def eager_pass(hidden: Tensor, table: Tensor, segments: Tensor, rate: float) -> Callable[[], None]:
    """The same by transformers."""
    config = DebertaV2Config(
        hidden_size=HEADS * HEAD_SIZE, num_attention_heads=HEADS, relative_attention=True, position_buckets=BUCKETS,
        max_position_embeddings=REACH, pos_att_type=["c2p", "p2c"], share_att_key=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=rate,
    )  # fmt: skip
    attention = DisentangledSelfAttention(config).train()
    pass_through(attention, *PROJECTIONS)
    seen = (segments.unsqueeze(1) == segments.unsqueeze(2)).unsqueeze(1)

    def run() -> None:
        attention(hidden, seen, rel_embeddings=table)[0].sum().backward()

    return run


def ways_of(segments: Tensor, rate: float, names: list[str]) -> list[Way]:
    """Transformers first."""
    dtype = torch.float32 if segments.device.type == "cpu" else torch.bfloat16
    sizes = [(*segments.shape, HEADS * HEAD_SIZE), (2 * BUCKETS, HEADS * HEAD_SIZE)]
    hidden, table = (torch.randn(size, device=segments.device, dtype=dtype).requires_grad_() for size in sizes)
    kernels = [Way(name, kernel_pass(name, hidden, table, segments, rate)) for name in names]
    return [Way("transformers", eager_pass(hidden, table, segments, rate)), *kernels]


if __name__ == "__main__":
    compare(parse_arguments(__doc__), ways_of)
