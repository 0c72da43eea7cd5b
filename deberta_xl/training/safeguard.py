"""Keeps a run that diverges from its good checkpoints, ends it, and says how it can go on.

Nothing is saved while the last update had no finite gradient, nor ever with a weight that is not finite. Old
checkpoints are deleted only when an update from the newest one's weights was finite, since weights can be destroyed
and finite. All ranks come to the same decisions: a gradient is finite, or not, for all of them.
"""

from __future__ import annotations

import logging
from pathlib import Path

from deberta_xl.base.errors import Diverged
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.folders import prune_checkpoints
from deberta_xl.checkpoint.manifest import step_folder_name, step_folders
from deberta_xl.training.state import WINDOW, TrainState

PATIENCE = 30
"""Steps without a finite gradient, among the last WINDOW, that end a run. fp16's search for its scale takes 17."""


class Safeguard:
    """Stands between a run and its checkpoints."""

    def __init__(self, state: TrainState, newest: Path | None, checkpoints: Path, keep: int):
        """`newest` is the checkpoint that this start goes on from, `keep` how many are kept (0: all)."""
        self.state, self.checkpoints, self.keep = state, checkpoints, keep
        self.unproved = newest
        """The newest checkpoint, as long as no update from its weights was finite."""
        self.is_told = False

    def after_step(self) -> None:
        """Look at the step just made. Raises Diverged when too many had no finite gradient. Collective."""
        if self.state.is_finite:
            self.prune()
        if not self.state.is_finite and len(self.state.lately_skipped) >= PATIENCE:
            first, last = self.state.lately_skipped[0], self.state.step
            raise Diverged(
                f"loss or gradient{self.state.whose()} were not finite in {len(self.state.lately_skipped)} of the last "
                f"{min(WINDOW, last)} steps, from step {first} on: the run has diverged"
            )

    def may_save(self) -> bool:
        """Whether the last step lets its weights be saved; says so where it does not, once until it does again."""
        if not self.state.is_finite and not self.is_told:
            rank_zero(
                "step %d: no checkpoint until a step has a finite gradient", self.state.step, level=logging.WARNING
            )
        self.is_told = not self.state.is_finite
        return self.state.is_finite

    def saved(self, folder: Path) -> None:
        """A checkpoint was written."""
        self.unproved = folder

    def prune(self) -> None:
        """Delete the checkpoints that the newest one outdates, which has proved itself. Collective."""
        newest, self.unproved = self.unproved, None
        if newest is not None:
            spared = self.state.best_step
            prune_checkpoints(newest, self.keep, spared=step_folder_name(spared) if spared else None)

    def check_end(self, *, searches_scale: bool) -> None:
        """Raises Diverged where the last step of the run had no finite gradient: such a run is not done.

        In fp16 (`searches_scale`) a single such step is how the loss scale is found, every 1000 steps or so. It may be
        the last one; the weights are then those of the step before, and count as finite.
        """
        state = self.state
        if searches_scale and not state.is_finite and state.step - 1 not in state.lately_skipped:
            state.lately_skipped.remove(state.step)
        if not state.is_finite:
            raise Diverged(
                f"loss or gradient{state.whose()} were not finite in the run's last step, {state.step} (and in "
                f"{len(state.lately_skipped)} of the last {min(WINDOW, state.step)}): it has diverged"
            )

    def way_out(self) -> str:
        """How a run that has diverged can go on, as its checkpoints are."""
        better = "a lower optimizer.learning_rate or a longer warm-up"
        folders = step_folders(self.checkpoints)
        proved = [folder for folder in folders if self.unproved is None or folder.name < self.unproved.name]
        run = self.checkpoints.parent
        if not folders:
            return f"Nothing was saved: start again with {better}, from step 0"
        if not proved:
            return (
                f"There is no good checkpoint: {self.unproved}, the only one, never gave a finite gradient. Delete "
                f"{run}, or choose another run.folder, and start again with {better}"
            )
        delete = (
            f"Delete {self.unproved}, whose weights never gave a finite gradient, and start"
            if self.unproved
            else "Start"
        )
        return (
            f"The last good checkpoint is {proved[0]}. {delete} the same command with {better}: it goes on from there"
        )
