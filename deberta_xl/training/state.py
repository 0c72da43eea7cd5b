"""What a run has to remember: everything else is a function of it, of the configuration and of the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from deberta_xl.base.errors import ConfigError

WINDOW = 100
"""The last steps, of which those without a finite gradient are remembered one by one."""


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Optimizer updates made."""
    consumed_samples: int = 0
    """Rows seen since the first step; where the data stands. Several shorter ones in the place of one count as one."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite: DeepSpeed leaves such an update out."""
    lately_skipped: list[int] = field(default_factory=list)
    """Those of them that are among the last WINDOW steps."""
    lately_left_out: dict[str, list[int]] = field(default_factory=dict)
    """Learner -> those of these steps in which its own update was left out, where learners are updated apart."""

    best_step: int = 0
    """Step of the best weights, where they are kept; 0 before the first evaluation."""
    best_value: float | None = None
    """What evaluations are compared by, there."""
    num_waited: int = 0
    """Evaluations since, without a better value."""
    evaluated_step: int = 0
    """Step of the last evaluation that was finished before its checkpoint."""

    @property
    def is_finite(self) -> bool:
        """Whether the last step had a finite gradient."""
        return self.step not in self.lately_skipped

    def advance(self, num_samples: int, *, is_finite: bool = True, left_out: Collection[str] = ()) -> None:
        """One more step over `num_samples` rows, in which the updates of these learners were `left_out`."""
        self.step += 1
        self.consumed_samples += num_samples
        self.skipped_steps += not is_finite
        skipped = self.lately_skipped if is_finite else [*self.lately_skipped, self.step]
        self.lately_skipped = [step for step in skipped if step > self.step - WINDOW]
        steps_of = self.lately_left_out | {name: [*self.lately_left_out.get(name, ()), self.step] for name in left_out}
        late = {name: [step for step in steps if step > self.step - WINDOW] for name, steps in steps_of.items()}
        self.lately_left_out = {name: steps for name, steps in late.items() if steps}

    def whose(self, since: int = 0) -> str:
        """` of the discriminator (5 times) and the generator (once)`: whose updates were left out after this step.

        Nothing where all parameters learn together.
        """
        counts = {name: sum(step > since for step in steps) for name, steps in sorted(self.lately_left_out.items())}
        found = {name: "once" if count == 1 else f"{count} times" for name, count in counts.items() if count}
        return f" of {' and '.join(f'the {name} ({times})' for name, times in found.items())}" if found else ""

    def take(self, value: float | None, is_better: Callable[[float | None, float | None], bool]) -> bool:
        """Take in an evaluation of this step; whether these are the best weights so far.

        The first evaluation's are, even where its predictions leave the value undefined. Weights that may not be saved
        now, after a step without a finite gradient, are not taken in.
        """
        self.evaluated_step = self.step
        if not self.is_finite:
            return False
        if self.best_step == 0 or is_better(value, self.best_value):
            self.best_step, self.best_value, self.num_waited = self.step, value, 0
            return True
        self.num_waited += 1
        return False

    def has_waited(self, patience: int) -> bool:
        """Whether to stop early; a patience of 0 never does."""
        return 0 < patience <= self.num_waited


SAID_NOTHING = {"objective": "masked_lm"}
"""What a checkpoint means that says nothing of it, since it is older than the choice."""


def check_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue on another objective, architecture, dataset, tokenizer or seed than the checkpoint's.

    How rows are masked may change between two starts, as rates and batch sizes may, which the start reports; the seed
    may not: it is the order of the data, and two runs of a table that share a folder by mistake differ in nothing else.
    """
    saved = SAID_NOTHING | {"seed": current.get("seed")} | saved
    for what, value in current.items():
        if saved.get(what) != value:
            raise ConfigError(
                f"the run folder's checkpoint was made with another {what}: {difference(saved.get(what), value)}; "
                "start another run.folder, with train.init=CHECKPOINT to keep the weights"
            )


def check_last_step(saved_step: int, steps: int) -> None:
    """Refuse to continue to a step that the checkpoint has behind it."""
    if steps < saved_step:
        raise ConfigError(
            f"train.steps={steps}, but the run folder's newest checkpoint is of step {saved_step}: set train.steps to "
            f"more than {saved_step} to train on, or start another run.folder"
        )


def difference(saved: Any, current: Any) -> str:
    """What differs between two values, key by key for mappings."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        keys = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
        return ", ".join(f"{key} was {saved.get(key)!r}, now {current.get(key)!r}" for key in keys)
    return f"was {saved!r}, now {current!r}"
