"""Fresh weights: N(0, initializer_range) for matrices and tables (the padding row too), 1 and 0 for norms and biases.

So it is with what a head of one's own has: a vector called `weight` is 1, any other vector or number 0, all else drawn.

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
                initialize_parameter(name, parameter, initializer_range, generator)


def initialize_parameter(name: str, parameter: Tensor, initializer_range: float, generator: torch.Generator) -> None:
    """Fill one parameter by its name and dimensions."""
    if parameter.dim() > 1:
        parameter.normal_(0.0, initializer_range, generator=generator)
    elif name == "weight":
        parameter.fill_(1.0)
    else:
        parameter.zero_()
