"""The `checkpoints` folder of a run: finding the newest checkpoint that is whole, and deleting old ones."""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

from deberta_xl.base.durable import remove
from deberta_xl.base.log import logger, rank_zero
from deberta_xl.checkpoint.manifest import CheckpointError, read_manifest, step_folder_name, step_folders, verify_files
from deberta_xl.checkpoint.together import on_rank_zero, rank_and_size, together


def make_partial_folder(checkpoints: Path, step: int) -> Path:
    """A fresh folder to write a checkpoint into until it is whole; leftovers of saves that never finished are deleted.

    No other save has its name, be it of the same step: an earlier start of the run may still be writing on a node
    that was lost, and may clean up after itself there.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_partial_folders(checkpoints)
    folder = checkpoints / f".{step_folder_name(step)}.{uuid.uuid4().hex[:8]}.partial"
    folder.mkdir()
    return folder


def remove_partial_folders(checkpoints: Path) -> None:
    """Delete what saves that never finished have left."""
    for leftover in checkpoints.glob(".step-*.partial"):
        remove(leftover)


def newest_whole_checkpoint(checkpoints: Path, *, collective: bool) -> Path | None:
    """The newest step folder in which every file is as its manifest states; None when there is no step folder at all.

    Damaged and incomplete folders are passed over with a WARNING that names the file and what is wrong. All files of a
    candidate are hashed; a `collective` call divides them over the ranks, which then agree.

    Raises CheckpointError when there are checkpoints and none of them is whole: a run never starts anew by mistake.
    """
    candidates = on_rank_zero(lambda: step_folders(checkpoints)) if collective else step_folders(checkpoints)
    damages = []
    for folder in candidates:
        try:
            verify_checkpoint(folder, collective=collective)
        except CheckpointError as damage:
            damages.append(str(damage))
            rank_zero("checkpoint passed over: %s", damage, level=logging.WARNING)
        else:
            if damages:
                rank_zero("using the newest whole checkpoint instead: %s", folder, level=logging.WARNING)
            return folder
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {checkpoints} is whole: {'; '.join(damages)}. "
            "Restore one of them from a copy, or move the folder away to start from step 0"
        )
    _warn_about_unfinished_saves(checkpoints)
    return None


def _warn_about_unfinished_saves(checkpoints: Path) -> None:
    """Say so when a run starts anew although something had begun to be saved."""
    leftovers = sorted(path.name for path in checkpoints.glob(".step-*.partial")) if checkpoints.is_dir() else []
    if leftovers:
        rank_zero("%s holds only unfinished saves (%s)", checkpoints, ", ".join(leftovers), level=logging.WARNING)


def verify_checkpoint(folder: Path, *, collective: bool) -> None:
    """Hash every file of a checkpoint; a `collective` call divides them over the ranks, which then agree.

    Raises CheckpointError (on every rank) naming the files that are damaged or missing.
    """
    if collective:
        rank, world_size = rank_and_size()
        files = on_rank_zero(lambda: read_manifest(folder))
        together(lambda: verify_files(folder, files, rank=rank, world_size=world_size))
    else:
        verify_files(folder, read_manifest(folder))


def prune_checkpoints(newest: Path, keep: int, spared: str | None = None) -> None:
    """Delete the oldest step folders beside `newest`, the one just saved, until `keep` are left; 0 keeps all.

    The folder named `spared` stays in any case.

    Folders of later steps are not touched and not counted: they were found damaged, or `newest` would not be the one
    to go on from. A folder that cannot be deleted is a WARNING. Collective where there is a process group.
    """

    def doomed() -> list[Path]:
        older = [f for f in step_folders(newest.parent) if f.name <= newest.name]
        return [f for f in older[keep:] if f.name != spared]

    if keep:
        on_rank_zero(lambda: _delete(doomed()))


def _delete(folders: list[Path]) -> None:
    """Delete step folders; what a crash leaves of one is no step folder any more."""
    for folder in folders:
        try:
            doomed = folder.rename(folder.with_name(f".{folder.name}.partial"))
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("old checkpoint %s cannot be deleted: %s", folder, error)
