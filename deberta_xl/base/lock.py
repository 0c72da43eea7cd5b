"""One writer at a time: a lock file beside an output."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from deberta_xl.base.errors import DataError
from deberta_xl.base.log import logger


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
