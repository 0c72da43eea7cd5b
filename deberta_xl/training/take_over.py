"""How a start takes over its run folder: what it may continue is checked before anything but the owner changes there.

The claim comes first, since the check may take minutes (every file is hashed) in which the folder must be somebody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deberta_xl.checkpoint.folders import newest_whole_checkpoint
from deberta_xl.checkpoint.store import read_state
from deberta_xl.checkpoint.together import on_rank_zero, rank_and_size
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.ownership import Ownership, claim_folder, own_claim, read_owner
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.pretraining import RunConfig
from deberta_xl.training.state import check_fingerprints, check_last_step


class TakenOver(NamedTuple):
    """A run folder that is this start's."""

    newest: Path | None
    """Its newest whole checkpoint; None for a new run."""
    ownership: Ownership
    heartbeat: Heartbeat


def take_over(
    folder: RunFolder,
    config: RunConfig | FinetuneConfig,
    tokenizer: Path,
    *,
    fingerprints: Mapping[str, Any],
    last_step: int,
    facts: Mapping[str, Any],
) -> TakenOver:
    """Claim the run folder, find its newest whole checkpoint and prepare the folder. Collective.

    `fingerprints` is what a checkpoint must agree with, `facts` what `environment.json` tells of this start. When that
    is refused, the folder is given back to the start that had it before.
    """
    before = read_owner(folder.owner)
    ownership = Ownership(folder.owner, on_rank_zero(lambda: claim_folder(folder, own_claim())))
    rank, size = rank_and_size()
    heartbeat = Heartbeat(folder.heartbeat, rank, ownership, size)
    try:
        newest = find_checkpoint(folder, fingerprints, last_step)
        on_rank_zero(ownership.check)
    except BaseException:
        heartbeat.mark(0, "stopped")
        heartbeat.close()
        if rank == 0:
            ownership.give_back(before)
        raise
    on_rank_zero(lambda: folder.prepare(config, tokenizer, facts))
    return TakenOver(newest, ownership, heartbeat)


def find_checkpoint(folder: RunFolder, fingerprints: Mapping[str, Any], last_step: int) -> Path | None:
    """The newest whole checkpoint, None when there is none; refused unless it can be continued. Collective."""
    newest = newest_whole_checkpoint(folder.checkpoints, collective=True)

    def check() -> None:
        folder.check_latest(newest)
        if newest is not None:
            saved = read_state(newest)
            check_fingerprints(saved["fingerprints"], fingerprints)
            check_last_step(saved["step"], last_step)

    on_rank_zero(check)
    return newest
