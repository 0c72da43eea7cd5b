"""Steps that have nothing to learn from: no token of the global batch is to be predicted."""

from __future__ import annotations

import logging

from deberta_xl.base.errors import HopelessRunError
from deberta_xl.base.log import rank_zero

PATIENCE = 100
"""Steps in a row; a tiny batch may lack labels by chance, but never so often."""


class EmptySteps:
    """Counts them over a start, and says so; all ranks see the same number of labels."""

    def __init__(self, total_steps: int, hint: str):
        self.patience = min(PATIENCE, total_steps)
        self.hint = hint
        """What to change."""
        self.num_in_a_row = self.num_steps = 0

    def check(self, step: int, num_labels: int) -> None:
        """Take in a step. Raises HopelessRunError where `patience` in a row, or all of a short run, had no label."""
        self.num_in_a_row = 0 if num_labels else self.num_in_a_row + 1
        if num_labels:
            return
        self.num_steps += 1
        if self.num_in_a_row == self.patience:
            raise HopelessRunError(
                f"none of the last {self.num_in_a_row} steps had a label to learn from (up to step {step}): {self.hint}"
            )
        if self.num_steps in (1, 10, 100) or self.num_steps % 1000 == 0:
            rank_zero(
                "step %d has no label to learn from (%d so far): its loss does not count. %s",
                step, self.num_steps, self.hint, level=logging.WARNING,
            )  # fmt: skip
