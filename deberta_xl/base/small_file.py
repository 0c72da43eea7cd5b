"""Reading what is small by its nature: a list of files, a configuration, a tokenizer.

A folder that others write to may hold something else under such a name: a pipe, on which a reader waits for ever, a
device or a file that is larger than memory, brackets nested deeper than a parser can follow.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

LIMIT = 256 * 2**20
"""Bytes; the manifest of 100,000 ranks has 13 MB, a tokenizer of a million pieces 20 MB."""


class NotSmallError(OSError, ValueError):
    """What stands there is not what its name says: a file that cannot be read, and one with the wrong content."""


def read_small(path: Path) -> bytes:
    """All of a file. Raises NotSmallError where something else is there, or more than LIMIT bytes."""
    if path.exists() and not path.is_file():
        raise NotSmallError(errno.EINVAL, "it is a folder, a pipe or a device, and should be a file", str(path))
    with path.open("rb") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise NotSmallError(errno.EFBIG, f"it has more than {LIMIT // 2**20} MiB", str(path))
    return content


def read_json(path: Path, **options: Any) -> Any:
    """The value in a JSON file; `options` are those of `json.loads`. Raises OSError, and ValueError for no JSON."""
    try:
        return json.loads(read_small(path), **options)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
