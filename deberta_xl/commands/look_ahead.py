"""What `--check` can tell of a run folder: whether a start there would be refused. Nothing is changed or hashed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.manifest import STATE_NAME, CheckpointError, step_folders
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.training.state import check_fingerprints, check_last_step


def check_run_folder(path: str, fingerprints: Callable[[], Mapping[str, Any]], last_step: int) -> None:
    """Refuse what a start in this folder would refuse: see `take_over.find_checkpoint`.

    The newest checkpoint is taken for whole; one whose state cannot be read is passed over. Raises ConfigError.
    """
    folder = RunFolder(path)
    check_can_be_made(folder.path)
    checkpoints = step_folders(folder.checkpoints)
    if not checkpoints:
        folder.check_latest(None)
    for checkpoint in checkpoints:
        try:
            saved = read_json(checkpoint / STATE_NAME)
            prints, step = saved["fingerprints"], saved["step"]
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            continue
        check_fingerprints(prints, fingerprints())
        check_last_step(step, last_step)
        return


def check_can_be_made(folder: Path) -> None:
    """Refuse a run folder in the place of a file, or that may not be written to.

    A folder that is not there yet may be on a disk that only the job sees.
    """
    for place in (folder, *folder.absolute().parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"run.folder={folder}: {place} is a file; choose another folder")
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"run.folder={folder} may not be written to; choose another folder")
