"""What makes a folder a checkpoint: `manifest.json`, written last, with the size and the hash of every file.

A folder without a manifest, or with a file that differs from it, is not a checkpoint. Only files a manifest names are
read, and it can name only files inside its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from deberta_xl.base import signs
from deberta_xl.base.durable import sync, write_file
from deberta_xl.base.errors import UserError
from deberta_xl.base.progress import progress
from deberta_xl.base.small_file import read_json

MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
"""What a run remembers, beside its tensors."""
FORMAT_VERSION = 1
HASHED_AT_ONCE = 4 * 2**20
"""Bytes."""
STEP_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(UserError):
    """A checkpoint cannot be written or used; the message names the file, what is wrong and the way out."""


class FileFacts(NamedTuple):
    """What a manifest states about one file."""

    size: int
    """Bytes."""
    sha256: str
    """Hash of the content, 64 hexadecimal digits."""


def step_folder_name(step: int) -> str:
    """`step-00001000` for 1000."""
    name = f"step-{step:08d}"
    if not STEP_NAME.fullmatch(name):
        raise CheckpointError(f"step {step} cannot name a checkpoint; allowed: 0 … 99999999")
    return name


def step_folders(checkpoints: Path) -> list[Path]:
    """The folders of `checkpoints` that are named like a step, newest first; none when there is no such folder."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if STEP_NAME.fullmatch(path.name)), reverse=True)


def file_facts(path: Path, advance: Callable[[int], None] = signs.moved) -> FileFacts:
    """Size and hash of a file as it can be read back; `advance` is told of every few bytes that are read."""
    digest, block = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            advance(count)
        return FileFacts(file.tell(), digest.hexdigest())


def content_facts(content: bytes) -> FileFacts:
    """Size and hash of what a file is to hold."""
    return FileFacts(len(content), hashlib.sha256(content).hexdigest())


def write_manifest(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Write `manifest.json` for `files` (path inside the folder → facts) and force the folder to the disk."""
    listing = {name: facts._asdict() for name, facts in sorted(files.items())}
    text = json.dumps({"format": FORMAT_VERSION, "files": listing}, indent=1)
    write_file(folder / MANIFEST_NAME, text.encode())
    for changed in {folder, *(inside(folder, name).parent for name in files)}:
        sync(changed)


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """The files of a checkpoint, by path inside it. Raises CheckpointError when there is no usable manifest."""
    path = folder / MANIFEST_NAME
    try:
        content = read_json(path, object_pairs_hook=_without_repetition)
        if content["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {content['format']!r} is not {FORMAT_VERSION}, the one read here")
        files = {name: FileFacts(int(facts["size"]), str(facts["sha256"])) for name, facts in content["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was never finished, or is no checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{path} is damaged: it is no list of files with sizes and hashes") from None
    for name in files:
        inside(folder, name)
    return files


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that appears twice (a changed digit in a file name makes one) is an error."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"repeated key among {[key for key, _ in pairs]}")
    return dict(pairs)


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` of a checkpoint. Raises CheckpointError when it would lie outside the folder."""
    parts = PurePosixPath(name).parts
    path = folder / name
    try:
        is_outside = not parts or ".." in parts or "\0" in name or not path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # links that lead to each other
        is_outside = True
    if is_outside:
        raise CheckpointError(f"{folder / MANIFEST_NAME} names {name!r}, which lies outside its folder: not read")
    return path


def verify_files(folder: Path, files: Mapping[str, FileFacts], *, rank: int = 0, world_size: int = 1) -> None:
    """Compare every `world_size`-th file, from the `rank`-th on, with what the manifest states.

    Raises CheckpointError naming the first file that is missing, has another size or another hash.
    """
    by_size = sorted(files.items(), key=lambda item: (-item[1].size, item[0]))  # so that the shares weigh alike
    share = by_size[rank::world_size]
    with progress(f"verifying {folder.name}", sum(stated.size for _, stated in share)) as advance:
        for name, stated in share:
            verify_file(inside(folder, name), stated, advance)


def verify_file(path: Path, stated: FileFacts, advance: Callable[[int], None]) -> None:
    """Raise CheckpointError unless a file is there with the size and the hash that the manifest states."""
    try:
        size = path.stat().st_size
        if size != stated.size:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes, the manifest states {stated.size}")
        if file_facts(path, advance).sha256 != stated.sha256:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the one in the manifest")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though the manifest names it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
