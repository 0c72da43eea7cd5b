"""What a loss that explodes, and steps without finite values, look like from outside."""

from __future__ import annotations

import math

from deberta_xl.base.log import logger
from deberta_xl.training.state import TrainState

SMOOTHING = 0.9
"""Weight of the past in the smoothed loss, per logged step."""
ALARM, RELIEF = 1.0, 0.5
"""Nats above the best smoothed loss at which a warning is given, and below which another one may follow."""


class Explosion:
    """Warns when the smoothed training loss, finite as it may be, has risen far above what it was."""

    def __init__(self, guessing: float):
        """`guessing` is the loss of knowing nothing, nats."""
        self.guessing = guessing
        self.smoothed: float | None = None
        self.best = math.inf
        self.is_told = False

    def check(self, step: int, loss: float) -> None:
        """Take in the loss of a logged step."""
        if not math.isfinite(loss):
            return
        past = loss if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * past + (1 - SMOOTHING) * loss
        self.best = min(self.best, self.smoothed)
        if self.smoothed > self.best + ALARM and not self.is_told:
            self.is_told = True
            logger.warning(
                "step %d: the loss has risen to %.2f (smoothed) from %.2f at its best, and knowing nothing gives %.2f: "
                "if it does not come down again, go back to an earlier checkpoint with a lower "
                "optimizer.learning_rate, or a longer warm-up",
                step, self.smoothed, self.best, self.guessing,
            )  # fmt: skip
        elif self.smoothed < self.best + RELIEF:
            self.is_told = False


class SkippedSteps:
    """Says at logged steps what was skipped since the last one."""

    def __init__(self, state: TrainState):
        self.told = state.skipped_steps

    def tell(self, state: TrainState, num_steps: int) -> None:
        """A warning where any of the last `num_steps` had no finite gradient."""
        new, self.told = state.skipped_steps - self.told, state.skipped_steps
        if new:
            logger.warning(
                "step %d: the gradient%s was not finite in %d of the last %d steps (%d in all)",
                state.step, state.whose(state.step - num_steps), new, num_steps, state.skipped_steps,
            )  # fmt: skip
