"""What a fine-tuning run has to remember beside its step: how good its best weights were, and when that was."""

from __future__ import annotations

from dataclasses import dataclass

from deberta_xl.data.task_metrics import is_better
from deberta_xl.data.tasks import Metric
from deberta_xl.training.state import TrainState


@dataclass
class TaskState(TrainState):
    """Progress of a run."""

    best_step: int = 0
    """Step of the best weights; 0 before the first evaluation."""
    best_value: float | None = None
    """The task's first metric there."""
    num_waited: int = 0
    """Evaluations since, without a better value."""
    evaluated_step: int = 0
    """Step of the last evaluation that was finished."""

    @property
    def spared_step(self) -> int:
        """That of the best weights."""
        return self.best_step

    def take(self, metric: Metric, value: float | None) -> bool:
        """Take in an evaluation of this step; whether these are the best weights so far.

        The first evaluation's are, even where its predictions leave the metric undefined. Weights that may not be saved
        now, after a step without a finite gradient, are not taken in.
        """
        self.evaluated_step = self.step
        if not self.is_finite:
            return False
        if self.best_step == 0 or is_better(metric, value, self.best_value):
            self.best_step, self.best_value, self.num_waited = self.step, value, 0
            return True
        self.num_waited += 1
        return False

    def has_waited(self, patience: int) -> bool:
        """Whether to stop early; a patience of 0 never does."""
        return 0 < patience <= self.num_waited
