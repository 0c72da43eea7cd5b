"""How a start takes over its run folder: what it may continue is checked before anything in the folder changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deberta_xl.checkpoint.agreement import on_rank_zero
from deberta_xl.checkpoint.folders import newest_whole_checkpoint
from deberta_xl.checkpoint.store import read_state
from deberta_xl.config import RunConfig
from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.training.ownership import Ownership, claim_folder, own_claim
from deberta_xl.training.run_folder import RunFolder
from deberta_xl.training.state import check_fingerprints, check_last_step


def take_over(
    folder: RunFolder,
    config: RunConfig | FinetuneConfig,
    tokenizer: Path,
    *,
    fingerprints: Mapping[str, Any],
    last_step: int,
    facts: Mapping[str, Any],
) -> tuple[Path | None, Ownership]:
    """Prepare the run folder and claim it; its newest whole checkpoint, None when there is none. Collective.

    `fingerprints` is what a checkpoint must agree with, `facts` what `environment.json` tells of this start.
    """
    newest = newest_whole_checkpoint(folder.checkpoints, collective=True)

    def check() -> None:
        folder.check_latest(newest)
        if newest is not None:
            saved = read_state(newest)
            check_fingerprints(saved["fingerprints"], fingerprints)
            check_last_step(saved["step"], last_step)

    on_rank_zero(check)
    ownership = Ownership(folder.owner, on_rank_zero(lambda: claim_folder(folder, own_claim())))
    on_rank_zero(lambda: folder.prepare(config, tokenizer, facts))
    return newest, ownership
