"""Writing so that a reader never sees a half: beside the target, to the disk, then renamed; one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deberta_xl.data.errors import DataError
from deberta_xl.log import logger


def partial(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(f"{path.name}.partial")


def sync_file(path: Path) -> None:
    """Make a file's bytes (or a folder's entries) survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(path: Path) -> None:
    """Put the finished `partial(path)`, a file or a folder of files, in place of `path`."""
    written = partial(path)
    for entry in written.iterdir() if written.is_dir() else [written]:
        sync_file(entry)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(written, path)
    sync_file(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; DataError when another process holds it. A killed holder leaves no lock behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(descriptor, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Lock an open lock file, or explain why not; a file system without locks is warned about and used as it is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            logger.warning("%s: no file locks here; take care that only one process writes this output", path.parent)
            return
        is_current = False
    if not is_current:
        raise DataError(f"{path}: another process is writing this output; wait for it, or choose another one")
