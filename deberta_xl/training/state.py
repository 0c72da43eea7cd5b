"""What a run has to remember: everything else is a function of it, of the configuration and of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deberta_xl.errors import ConfigError


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Optimizer updates made."""
    consumed_samples: int = 0
    """Rows seen since the first step; where the data stands."""

    def advance(self, num_samples: int) -> None:
        """One more step over `num_samples` rows."""
        self.step += 1
        self.consumed_samples += num_samples


def check_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue on another architecture, dataset or tokenizer than the checkpoint's."""
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
