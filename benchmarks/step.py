"""Forward and backward of masked language modelling: ours with the enhanced mask decoder, others without.

6 layers of 384, 6 heads, a vocabulary of 8,192, or with `--model xxlarge` the 1.5 billion parameters of that preset;
15 % of the tokens labelled; float32 on a CPU, bfloat16 on a GPU. The optimizer's step is left out. On a GPU the share
of its peak is told to which the operations amount that training needs by the project's own count.

examples:
  python benchmarks/step.py
  python benchmarks/step.py --lengths 512 --tokens 2048 --dropout 0.1 --json step.json
  python benchmarks/step.py --model xxlarge --lengths 512 --tokens 4096 --rows dense --dropout 0.1  # on a GPU
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.anchors import MODELS
from benchmarks.interleaved import Case, Run, Way, compare, disagreements, parse_arguments
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import forward_flops, masked_lm_parts
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.presets import load_run_config
from deberta_xl.weights.foreign_config import to_huggingface_config

REACH, LABELLED = 512, 0.15
FORWARD_AND_BACKWARD = 3
"""Forward passes that both are worth: the backward pass has twice the work."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of a result's norm, dropout off; a table's gradient through six layers in bfloat16 is that rough."""
SMALL = [
    "model.vocab_size=8192", "model.hidden_size=384", "model.intermediate_size=1536", "model.num_layers=6",
    "model.num_heads=6",
]  # fmt: skip


def config_of(case: Case, options: argparse.Namespace) -> DebertaConfig:
    """The model, with as many positions as the rows have."""
    preset, sizes = ("base", SMALL) if options.model == "small" else (options.model, ["model.vocab_size=128100"])
    positions = max(REACH, case.segments.shape[1])
    overrides = [f"model.dropout={case.rate}", f"model.max_position_embeddings={positions}",
                 f"model.max_relative_positions={REACH}"]  # fmt: skip
    return load_run_config(preset, [*sizes, *overrides]).model.architecture(2)


class Batch:
    """Ids, labels (0: none) and their places."""

    def __init__(self, case: Case, vocab_size: int):
        device, shape = case.segments.device, case.segments.shape
        generator = torch.Generator(device).manual_seed(1)
        self.ids = torch.randint(4, vocab_size, shape, device=device, generator=generator)
        self.labels = torch.where(torch.rand(shape, device=device, generator=generator) < LABELLED, self.ids, 0)
        self.labelled = LabelledPositions.of(self.labels).padded(shape[1])


def our_step(kernel: str, config: DebertaConfig, case: Case, batch: Batch) -> Run:
    """Forward and backward of our model with a kernel."""
    with torch.device(case.segments.device):
        model = MaskedLanguageModel(config).to(case.dtype).train()
    model.use_kernel(kernel)

    def run() -> tuple[Tensor, ...]:
        loss = model(batch.ids, case.segments, labels=batch.labelled, dropout_key=DropoutKey(1)).loss
        loss.backward()
        return results_of(model, loss, model.encoder.relative_position.table)

    return run


def their_step(name: str, config: DebertaConfig, case: Case, batch: Batch) -> Run:
    """The same of transformers' model, as `name` computes it."""
    model = MODELS[name](DebertaV2Config(**to_huggingface_config(config, is_legacy=True)), case)
    relative = model.deberta.encoder.rel_embeddings
    targets = torch.where(batch.labels > 0, batch.labels, -100)
    mask = torch.ones_like(batch.ids)

    def run() -> tuple[Tensor, ...]:
        loss = model(input_ids=batch.ids, attention_mask=mask, labels=targets).loss
        loss.backward()
        return results_of(model, loss, relative)

    return run


def results_of(model: nn.Module, loss: Tensor, relative: nn.Embedding) -> tuple[Tensor, ...]:
    """The loss and the relative table's gradient, in which every layer's attention has a part; all others are freed."""
    gradient = relative.weight.grad
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradient


def ways_of(case: Case, options: argparse.Namespace) -> list[Way]:
    """Transformers first."""
    config = config_of(case, options)
    batch = Batch(case, config.vocab_size)
    load = Load(*case.segments.shape, batch.labelled.num_labels)
    flops = FORWARD_AND_BACKWARD * forward_flops(masked_lm_parts(config), load)
    anchors = [Way(name, partial(their_step, name, config, case, batch)) for name in options.anchors]
    kernels = [Way(name, partial(our_step, name, config, case, batch), flops) for name in options.kernels]
    return [*anchors, *kernels]


def check(case: Case, options: argparse.Namespace) -> dict[str, Exception]:
    """The ways that compute something else than transformers' eager model, or than ours with the reference."""
    options = argparse.Namespace(**vars(options) | {"model": "small"})
    ways = {way.name: way for way in ways_of(case, options)}
    wrong: dict[str, Exception] = {}
    for first, names in (("transformers", options.anchors), ("reference", options.kernels)):
        others = [ways[name] for name in names if name != first]
        if others and first in names:
            wrong |= disagreements(others, ways[first].make()(), TOLERANCES[case.dtype])
    return wrong


if __name__ == "__main__":
    sys.exit(compare(parse_arguments(__doc__), ways_of, check))
