"""Dropout whose masks are a function of a key, so that nothing random is state.

A resumed run, a recomputed layer, another pipeline split and another number of tensor-parallel ranks draw the same
masks, because a mask depends only on its key, (seed, step, micro-batch of the global batch) folded with the name of the
place where it is drawn, and on the place of each element (`kernels/dropout.py`).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deberta_xl.kernels.dropout import DropoutRule, drop


class DropoutKey(NamedTuple):
    """Names a family of random masks: equal keys draw equal masks."""

    seed: int
    """63 bits."""

    def fold(self, *names: str | int) -> DropoutKey:
        """The key of a place inside this one, for example `key.fold("layers", 3)`."""
        text = "/".join(map(str, (self.seed, *names)))
        return DropoutKey(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1)

    def generator(self, device: torch.device) -> torch.Generator:
        """A fresh generator at this key's state."""
        return torch.Generator(device).manual_seed(self.seed)


def fold_key(key: DropoutKey | None, *names: str | int) -> DropoutKey | None:
    """`key.fold(*names)`, or None where the caller gave no key."""
    return None if key is None else key.fold(*names)


class Dropout(nn.Module):
    """Zeroes a share `probability` of the elements and scales the rest; the identity in evaluation."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def rule(self, key: DropoutKey | None = None) -> DropoutRule:
        """What is dropped under `key`: nothing in evaluation."""
        return DropoutRule(self.probability if self.training else 0.0, None if key is None else key.seed)

    def forward(self, x: Tensor, key: DropoutKey | None = None) -> Tensor:
        """`x` with the mask of `key`; without a key the mask comes from torch's global generator."""
        return drop(x, self.rule(key))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"probability={self.probability}"
