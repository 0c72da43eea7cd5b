"""A discriminator and a generator, as a run of replaced tokens stores them, without a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.replaced_tokens import ReplacedTokenModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import Sharing
from deberta_xl.weights.native import write_weights
from deberta_xl.weights.native_config import Learnt, native_config

DISCRIMINATOR = DebertaConfig(
    vocab_size=48, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=24, position_buckets=6,
    max_position_embeddings=32,
)  # fmt: skip
GENERATOR = replace(DISCRIMINATOR, num_layers=2)
WIDTH = DISCRIMINATOR.hidden_size
LEARNT = Learnt(sequence_length=24)
DETECTOR = {
    "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "dense.weight": (WIDTH, WIDTH), "dense.bias": (WIDTH,),
    "classifier.weight": (1, WIDTH), "classifier.bias": (1,),
}  # fmt: skip


def shapes(config: DebertaConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the masked-LM model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MaskedLanguageModel(config).named_parameters()}


def pair_tensors(sharing: Sharing, *, positions: bool = False) -> dict[str, Tensor]:
    """Random weights under the names of a native pair; the discriminator reads absolute positions or not."""
    config, partner = (replace(c, position_biased_input=positions) for c in (DISCRIMINATOR, GENERATOR))
    sizes = {f"generator.{name}": shape for name, shape in shapes(partner).items()}
    tables = {"embeddings.word.weight": True, "embeddings.position.weight": positions}
    for name, shape in shapes(config).items():
        if name in tables and tables[name] and sharing != "es":
            name = name if sharing == "none" else name.replace(".weight", "_delta.weight")
        elif name in tables or name.startswith("head."):
            continue
        sizes[f"discriminator.{name}"] = shape
    sizes |= {f"discriminator.detector.{name}": shape for name, shape in DETECTOR.items()}
    draw = torch.Generator().manual_seed(7)
    return {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in sizes.items()}


def fresh_pair(sharing: Sharing, *, generator: DebertaConfig = GENERATOR) -> ReplacedTokenModel:
    """Both models, before a start."""
    return ReplacedTokenModel(DISCRIMINATOR, generator, sharing, seed=1)


def write_pair(
    folder: Path, sharing: Sharing = "gdes", *, positions: bool = False, tokenizer: Path | None = None
) -> dict[str, Tensor]:
    """A native folder of a pair; its tensors."""
    tensors = pair_tensors(sharing, positions=positions)
    config, partner = (replace(c, position_biased_input=positions) for c in (DISCRIMINATOR, GENERATOR))
    facts = native_config(config, generator=partner, sharing=sharing, learnt=LEARNT)
    write_weights(folder, tensors, facts, tokenizer)
    return tensors
