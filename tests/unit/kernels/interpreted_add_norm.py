"""LayerNorm behind dropout and residual under Triton's interpreter; `test_fused.py` runs these, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deberta_xl.kernels.add_norm import add_norm
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.fused.drop import add_norm_states

RULES = [DropoutRule(), DropoutRule(0.3, 2**62 + 17)]


def outcome(way, inputs: list[Tensor], rule: DropoutRule, row: Tensor | None) -> list[Tensor]:
    """The states, and the gradient of every input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    states = way(*inputs, 1e-7, rule, row)
    sent = torch.randn(states.shape, generator=torch.Generator().manual_seed(2)).to(states.dtype)
    return [states.detach(), *torch.autograd.grad(states, inputs, sent)]


def random_inputs(num_rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight, bias."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in [(1, num_rows, width)] * 2 + [(width,)] * 2]


@pytest.mark.parametrize("has_rows", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=["", "dropout"])
@pytest.mark.parametrize("width", [5, 16, 33])
def test_states_and_gradients_are_those_of_torch(width, rule, has_rows):
    inputs = random_inputs(7, width, torch.float32)
    row = torch.randint(2**40, (1, 7)) if has_rows else None
    wanted = outcome(add_norm, [x.double() for x in inputs], rule, row)
    for found, true in zip(outcome(add_norm_states, inputs, rule, row), wanted, strict=True):
        # Sums of up to 33 float32 numbers, divided by a deviation.
        assert (found - true).abs().max() <= 2e-6 * true.abs().max()


def test_numbers_of_16_bits_come_with_errors_of_their_last_bits():
    inputs = random_inputs(6, 32, torch.float16)  # the interpreter cuts bfloat16 off, where a GPU rounds
    true = add_norm(*(x.double() for x in inputs), 1e-7, RULES[1], None)
    found = add_norm_states(*inputs, 1e-7, RULES[1], None)
    assert found.dtype == torch.float16
    # Rounded are what dropout leaves, the sum, and the outcome.
    assert (found - true).abs().max() <= 2 * torch.finfo(torch.float16).eps * true.abs().max()
