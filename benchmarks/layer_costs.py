"""What a layer costs on a GPU: launches, bytes moved and kept, and what they would take; counted without a GPU.

Forward and backward of masked language modelling in bfloat16 with dropout, 15 % of the tokens labelled. A layer is what
a model with three layers has more than one with two. The attention kernel is left out; `--kernel` counts one of ours.

The times are a model's: matrix products at the larger of their operations and their bytes, anything else at its bytes,
2 µs at least, no gap between them. Attention is added as `fused` was measured for rows of 512 tokens on an H200. The
share of the peak is that of the operations which training needs by the project's own count.

examples:
  python benchmarks/layer_costs.py
  python benchmarks/layer_costs.py --presets xxlarge --rows 4 --operators
  python benchmarks/layer_costs.py --kernel fused reference
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser
from benchmarks.recorder import Launch, Recorder, counted_bytes, pretended_gpu
from deberta_xl.model.disentangled_attention import Attend, Memory, RelativeRows, load_kernel
from deberta_xl.model.dropout import DropoutKey, DropoutRule
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.part_costs import KERNELS, Load
from deberta_xl.model.parts import forward_flops, masked_lm_parts
from deberta_xl.model.scene import Where
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.presets import load_run_config

MIB = 2**20
LABELLED = 0.15
FORWARD_AND_BACKWARD = 3
"""Forward passes that both are worth: the backward pass has twice the work."""
WITHOUT = "without"
SHORTEST_SECONDS = 2e-6
"""Of a launch, however small."""
PRODUCTS_OF_PEAK, STREAMS_OF_BANDWIDTH = 0.8, 0.85
"""Shares that matrix products and everything else are taken to reach."""
ATTENTION_SECONDS = 1.95e-3 / 8192 / 24
"""Of `fused` by token and head, forward and backward: 8,192 tokens in rows of 512, 24 heads, on an H200."""


class Costs(NamedTuple):
    """Of a pass forward and backward."""

    forward: list[Launch]
    backward: list[Launch]
    kept_bytes: int
    """By autograd, from the forward to the backward pass, weights not included."""


class Device(NamedTuple):
    """A GPU."""

    peak_flops: float
    """In a second, dense bfloat16."""
    bandwidth: float
    """Bytes in a second."""

    def seconds(self, launches: Iterable[Launch]) -> float:
        """What they take by the model above."""
        return sum(
            max(
                launch.operations / (self.peak_flops * PRODUCTS_OF_PEAK),
                launch.moved_bytes / (self.bandwidth * STREAMS_OF_BANDWIDTH),
                SHORTEST_SECONDS,
            )
            for launch in launches
        )


class NoKernel(torch.autograd.Function):
    """Attention that costs nothing, but keeps what any kernel does: queries, keys, values and projected rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, query_BNSH: Tensor, *others: Tensor) -> Tensor:
        """Room for the context; a token's heads lie side by side, as layers have them."""
        ctx.save_for_backward(query_BNSH, *others)
        return torch.empty_like(query_BNSH.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient_BNSH: Tensor) -> tuple[Tensor, ...]:
        """Room for all gradients."""
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def no_attention(
    query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule
) -> Tensor:
    """The contract's `Attend`."""
    return NoKernel.apply(query_BNSH, *memory, *(rows for rows in relative if rows is not None))


def config_of(preset: str, num_layers: int | None = None) -> DebertaConfig:
    """A preset with the vocabulary of DeBERTa-v3, and as many layers."""
    overrides = [] if num_layers is None else [f"model.num_layers={num_layers}"]
    return load_run_config(preset, ["model.vocab_size=128100", *overrides]).model.architecture(2)


def count_pass(config: DebertaConfig, rows: int, length: int, attend: Attend) -> Costs:
    """A pass over rows of one document each."""
    slots = round(LABELLED * length)
    with torch.device("meta"):
        model = MaskedLanguageModel(config).to(torch.bfloat16).train()
        ids = torch.empty(rows, length, dtype=torch.int64)
        place_L = torch.empty(rows * slots, dtype=torch.int64)
    for layer in model.encoder_layers.values():
        layer.attention.attend = attend
    labelled = LabelledPositions(place_L.view(rows, slots), place_L, place_L)
    recorder = Recorder()
    with pretended_gpu(recorder), counted_bytes(model) as counter:
        loss = model(ids, ids, labels=labelled, label_count=1.0, dropout_key=DropoutKey(1)).loss
        num_forward, kept_bytes = len(recorder.launches), counter.now
        loss.backward()
    return Costs(recorder.launches[:num_forward], recorder.launches[num_forward:], kept_bytes)


def count_layer(preset: str, rows: int, length: int, attend: Attend) -> tuple[Costs, Costs]:
    """(a model with two layers, the third)."""
    count_pass(config_of(preset, 2), rows, length, attend)  # what is made once and kept for all passes
    two, three = (count_pass(config_of(preset, number), rows, length, attend) for number in (2, 3))
    added = (list((Counter(more) - Counter(less)).elements()) for more, less in zip(three[:2], two[:2], strict=True))
    return two, Costs(*added, three.kept_bytes - two.kept_bytes)


def step_seconds(two: Costs, layer: Costs, num_layers: int, device: Device) -> float:
    """Forward and backward of a model with so many layers, attention left out."""
    rest, own = (device.seconds(costs.forward + costs.backward) for costs in (two, layer))
    return rest + (num_layers - 2) * own


def print_layer(title: str, layer: Costs, *, lists_operators: bool) -> None:
    """Its launches, bytes moved and kept."""
    print(f"{title}: keeps {layer.kept_bytes / MIB:,.1f} MiB")
    for name, launches in (("forward", layer.forward), ("backward", layer.backward)):
        products = [launch for launch in launches if launch.operations]
        moved, by_products = (sum(launch.moved_bytes for launch in some) / MIB for some in (launches, products))
        print(f"  {name:9}{len(launches):4} launches, {len(products):3} of them matrix products; moves {moved:8,.0f} "
              f"MiB, of them in products {by_products:8,.0f}")  # fmt: skip
        if lists_operators:
            for operator, number in Counter(launch.name for launch in launches).most_common():
                moved = sum(launch.moved_bytes for launch in launches if launch.name == operator) / MIB
                print(f"    {operator:28}{number:4} {moved:8,.0f} MiB")


def print_step(preset: str, two: Costs, layer: Costs, options: argparse.Namespace) -> None:
    """What the times of all layers come to."""
    config, tokens = config_of(preset), options.rows * options.length
    device = Device(options.peak_tflops * 1e12, options.bandwidth * 1e12)
    attention = config.num_layers * tokens * config.num_heads * ATTENTION_SECONDS
    taken = step_seconds(two, layer, config.num_layers, device) + attention
    load = Load(options.rows, options.length, LABELLED * tokens)
    needed = FORWARD_AND_BACKWARD * forward_flops(masked_lm_parts(config), load)
    own = device.seconds(layer.forward + layer.backward) + attention / config.num_layers
    print(f"  estimate: a layer {own * 1e3:.2f} ms, all {taken * 1e3:.0f} ms, of them attention {attention * 1e3:.0f}; "
          f"{needed / taken / device.peak_flops:.1%} of the peak")  # fmt: skip


def kernels_of(names: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """By name, what computes attention."""
    return {name: no_attention if name == WITHOUT else load_kernel(name) for name in names}


def main(arguments: list[str] | None = None) -> None:
    """Print what each layer costs."""
    parser = build_parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["base", "xxlarge"], help="(default: base xxlarge)")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a pass (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--kernel", nargs="+", choices=[WITHOUT, *KERNELS], default=[WITHOUT],
                        help="whose launches are counted, too (default: none's)")  # fmt: skip
    parser.add_argument("--operators", action="store_true", help="list them")
    parser.add_argument(
        "--peak_tflops", type=float, default=989.0, help="dense bfloat16 (default: %(default)s, an H100)"
    )
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s (default: %(default)s, an H100)")
    options = parser.parse_args(arguments)
    for preset in options.presets:
        for name, attend in kernels_of(options.kernel).items():
            two, layer = count_layer(preset, options.rows, options.length, attend)
            title = f"{preset}, {options.rows} x {options.length}, kernel: {name}"
            print_layer(title, layer, lists_operators=options.operators)
            if name == WITHOUT:
                print_step(preset, two, layer, options)


if __name__ == "__main__":
    main()
