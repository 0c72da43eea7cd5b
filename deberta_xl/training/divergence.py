"""Ends a run that learns nothing any more: one whose loss or gradient stays without a finite value."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deberta_xl.errors import UserError

PATIENCE = 30
"""Logged steps in a row; the search for fp16's loss scale takes 16 steps at most."""


class Divergence:
    """Looks at the metrics of logged steps, which are the same on every rank."""

    def __init__(self) -> None:
        self.first_step = self.num_steps = 0

    def check(self, step: int, values: Mapping[str, float | None]) -> None:
        """Raises UserError when loss or gradient norm have not been finite for PATIENCE logged steps in a row."""
        if all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
            self.num_steps = 0
            return
        self.first_step = step if self.num_steps == 0 else self.first_step
        self.num_steps += 1
        if self.num_steps == PATIENCE:
            raise UserError(
                f"loss or gradient have not been finite since step {self.first_step}: the run has diverged. Remove the "
                f"checkpoints from step {self.first_step} on, and start again with a lower optimizer.learning_rate or "
                "a longer warm-up"
            )
