"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from deberta_xl.base.durable import sync
from deberta_xl.base.lock import one_writer
from deberta_xl.checkpoint.manifest import CheckpointError


def refuse_existing(destination: Path) -> None:
    """Raise CheckpointError when something is there already; an empty folder is nothing."""
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is no folder; choose the name of a new one")
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} exists already; choose another folder, or delete it")


@contextlib.contextmanager
def whole_or_nothing(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into; it gets the name at the end, and is deleted after any failure.

    Raises CheckpointError when `folder` exists, when fewer than `num_bytes` are free, or when writing fails; DataError
    when another process is writing the same folder.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_writer(folder.with_name(f".{folder.name}.lock")):
            refuse_existing(folder)
            refuse_full_disk(folder, num_bytes)
            shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
            try:
                partial.mkdir()
                yield partial
                sync(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            sync(folder.parent)
    except (SafetensorError, OSError) as error:
        way_out = "; make room and start again" if getattr(error, "errno", None) == errno.ENOSPC else ""
        raise CheckpointError(f"{folder} cannot be written: {error}{way_out}") from error


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError, before anything is written, when it will not fit."""
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder} needs {num_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there; make room"
        )
