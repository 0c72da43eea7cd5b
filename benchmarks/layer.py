"""One encoder layer, forward and backward, with every kernel: attention, feed-forward block, norms, dropout of states.

As in a whole step with `--model small` (384 wide, 6 heads) or `--model xxlarge` (1,536 wide, 24 heads); float32 on a
CPU, bfloat16 on a GPU. `speed` is the first kernel's time over a kernel's own. Gradients are those of the states, of
the relative table and of all weights.

examples:
  python benchmarks/layer.py
  python benchmarks/layer.py --model xxlarge --lengths 512 8192 --rows dense --json layer.json
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaved import Case, Run, Way, compare, disagreements, parse_arguments
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.presets import load_run_config

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of a result's norm, dropout off."""
FEW = ["model.num_layers=2"]
"""Of which one is the decoder's."""
SMALL = ["model.hidden_size=384", "model.intermediate_size=1536", "model.num_heads=6"]


def config_of(case: Case, options: argparse.Namespace) -> DebertaConfig:
    """The model whose layer it is."""
    preset, sizes = ("base", SMALL) if options.model == "small" else (options.model, [])
    return load_run_config(preset, [*FEW, *sizes, f"model.dropout={case.rate}"]).model.architecture(2)


def layer_run(kernel: str, config: DebertaConfig, case: Case) -> Run:
    """Forward and backward; states after the layer, gradients of those before it, of the table and of all weights."""
    device = case.segments.device
    with torch.device(device):
        model = MaskedLanguageModel(config).to(case.dtype).train()
    model.use_kernel(kernel)
    layer, table = model.encoder.layers[0], model.encoder.relative_position
    generator = torch.Generator(device).manual_seed(1)
    size = (*case.segments.shape, config.hidden_size)
    hidden, gradient = (torch.randn(size, device=device, dtype=case.dtype, generator=generator) for _ in range(2))
    read = (hidden.requires_grad_(), *layer.parameters(), *table.parameters())

    def run() -> tuple[Tensor, ...]:
        output = layer(hidden, model.scene(case.segments, case.segments, DropoutKey(1)))
        return output.detach(), *torch.autograd.grad(output, read, gradient)

    return run


def ways_of(case: Case, options: argparse.Namespace) -> list[Way]:
    """Every kernel."""
    config = config_of(case, options)
    return [Way(name, partial(layer_run, name, config, case)) for name in options.kernels]


def check(case: Case, options: argparse.Namespace) -> dict[str, Exception]:
    """The kernels with which a layer gives something else than with the reference."""
    config = config_of(case, options)
    expected = layer_run("reference", config, case)()
    others = [way for way in ways_of(case, options) if way.name != "reference"]
    return disagreements(others, expected, TOLERANCES[case.dtype])


if __name__ == "__main__":
    sys.exit(compare(parse_arguments(__doc__, has_anchors=False), ways_of, check))
