"""Forward and backward of masked language modelling: ours with the enhanced mask decoder, transformers' without.

6 layers of 384, 6 heads, a vocabulary of 8,192, 15 % of the tokens labelled; float32 on a CPU, bfloat16 on a GPU.

examples:
  python benchmarks/step.py
  python benchmarks/step.py --lengths 512 --tokens 2048 --dropout 0.1 --json step.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaved import Way, compare, parse_arguments
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig

SIZES = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1536}
LAYERS, HEADS, BUCKETS, REACH = 6, 6, 256, 512
LABELLED = 0.15


def our_step(kernel: str, ids: Tensor, segments: Tensor, labels: Tensor, rate: float) -> Callable[[], None]:
    """Forward and backward of our model with a kernel."""
    config = DebertaConfig(
        **SIZES, num_layers=LAYERS, num_heads=HEADS, position_buckets=BUCKETS, max_position_embeddings=REACH,
        hidden_dropout=rate, attention_dropout=rate,
    )  # fmt: skip
    model = MaskedLanguageModel(config).to(ids.device, dtype_on(ids.device)).train()
    model.use_kernel(kernel)

    def run() -> None:
        model(ids, segments, labels=labels, dropout_key=DropoutKey(1)).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def eager_step(ids: Tensor, segments: Tensor, labels: Tensor, rate: float) -> Callable[[], None]:
    """The same of transformers' model."""
    config = DebertaV2Config(
        **SIZES, num_hidden_layers=LAYERS, num_attention_heads=HEADS, relative_attention=True,
        position_buckets=BUCKETS, max_position_embeddings=REACH, pos_att_type=["c2p", "p2c"], share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, hidden_dropout_prob=rate,
        attention_probs_dropout_prob=rate,
    )  # fmt: skip
    model = DebertaV2ForMaskedLM(config).to(ids.device, dtype_on(ids.device)).train()
    # The embeddings take no mask of pairs, the encoder does.
    seen = (segments.unsqueeze(1) == segments.unsqueeze(2)).unsqueeze(1)
    model.deberta.encoder.get_attention_mask = lambda _mask: seen
    targets = torch.where(labels > 0, labels, -100)

    def run() -> None:
        model(input_ids=ids, labels=targets).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def dtype_on(device: torch.device) -> torch.dtype:
    """What is trained in there."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def ways_of(segments: Tensor, rate: float, names: list[str]) -> list[Way]:
    """Transformers first."""
    ids = torch.randint(4, SIZES["vocab_size"], segments.shape, device=segments.device)
    labels = torch.where(torch.rand(segments.shape, device=segments.device) < LABELLED, ids, 0)
    kernels = [Way(name, our_step(name, ids, segments, labels, rate)) for name in names]
    return [Way("transformers", eager_step(ids, segments, labels, rate)), *kernels]


if __name__ == "__main__":
    compare(parse_arguments(__doc__), ways_of)
