"""Dropout as a function: of what it drops, and of a rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DropoutRule(NamedTuple):
    """Which elements are dropped."""

    rate: float = 0.0
    """Share that is zeroed, while the rest is scaled; 0, as in evaluation, drops nothing."""
    seed: int | None = None
    """63 bits of which the mask is a function; None draws from torch's global generator."""


def drop(x: Tensor, rule: DropoutRule) -> Tensor:
    """`x` with the mask of `rule`."""
    if rule.rate == 0:
        return x
    if rule.seed is None:
        return F.dropout(x, rule.rate)
    keep = 1 - rule.rate
    generator = torch.Generator(x.device).manual_seed(rule.seed)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return x * mask.bernoulli_(keep, generator=generator) / keep
