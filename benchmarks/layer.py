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
from torch import Tensor, nn

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.interleaved import Case, Run, Way, compare, disagreements, parse_arguments
from deberta_xl.kernels.registry import Demand, choose_kernel, load_kernel
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.relative_position import RelativePosition
from deberta_xl.model.scene import Scene, read_mask
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.presets import load_run_config

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of a result's norm, dropout off."""
SMALL = ["model.hidden_size=384", "model.intermediate_size=1536", "model.num_heads=6"]


def config_of(case: Case, options: argparse.Namespace) -> DebertaConfig:
    """The model whose layer it is."""
    preset, sizes = ("base", SMALL) if options.model == "small" else (options.model, [])
    return load_run_config(preset, [*sizes, f"model.dropout={case.rate}"]).model.architecture(2)


class Block(nn.Module):
    """A layer and the relative table that it reads."""

    def __init__(self, config: DebertaConfig, kernel: str):
        super().__init__()
        self.relative_position, self.layer = RelativePosition(config), EncoderLayer(config)
        self.kernel = kernel

    def choose(self) -> Block:
        """Compute attention with the kernel, where the weights are. Raises ConfigError."""
        attention = self.layer.attention
        chosen = choose_kernel(self.kernel, Demand(attention.config, platform=attention.platform))
        attention.attend, attention.is_chosen = load_kernel(chosen), True
        return self

    def forward(self, hidden_BSD: Tensor, segments_BS: Tensor) -> Tensor:
        """States after the layer."""
        where = read_mask(segments_BS, segments_BS, self.relative_position.buckets)
        return self.layer(hidden_BSD, Scene(where, self.relative_position(), DropoutKey(1)))


def layer_run(kernel: str, config: DebertaConfig, case: Case) -> Run:
    """Forward and backward; states after the layer, gradients of those before it and of all weights."""
    device = case.segments.device
    torch.manual_seed(1)
    with torch.device(device):
        block = Block(config, kernel).to(case.dtype).train().choose()
    for parameter in block.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=config.initializer_range)
    generator = torch.Generator(device).manual_seed(1)
    size = (*case.segments.shape, config.hidden_size)
    hidden, gradient = (torch.randn(size, device=device, dtype=case.dtype, generator=generator) for _ in range(2))
    read = (hidden.requires_grad_(), *block.parameters())

    def run() -> tuple[Tensor, ...]:
        output = block(hidden, case.segments)
        return output.detach(), *torch.autograd.grad(output, read, gradient, allow_unused=True)

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
