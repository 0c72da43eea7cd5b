"""Fresh weights: N(0, initializer_range) for matrices and tables (the padding row too), 1 and 0 for norms and biases.

Each parameter draws from a generator of its own, keyed by (seed, name): its values do not depend on the order of
construction, the device's global state, or which other parameters a rank holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deberta_xl.base import signs
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.ngram_convolution import NgramConvolution


@torch.no_grad()
def initialize_weights(model: nn.Module, initializer_range: float, seed: int) -> None:
    """Fill every parameter of `model` in place. The convolution keeps torch's uniform form, as the original does."""
    key = DropoutKey(seed)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            signs.moved()
            generator = key.fold("initialization", module_name, name).generator(parameter.device)
            if isinstance(module, NgramConvolution):
                bound = 1 / math.sqrt(module.weight[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                initialize_parameter(module, name, parameter, initializer_range, generator)


def initialize_parameter(
    module: nn.Module, name: str, parameter: Tensor, initializer_range: float, generator: torch.Generator
) -> None:
    """Fill one parameter by the kind of module that owns it."""
    if name == "weight" and isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0)
    elif name == "weight":
        parameter.normal_(0.0, initializer_range, generator=generator)
    else:
        parameter.zero_()
