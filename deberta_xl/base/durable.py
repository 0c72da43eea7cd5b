"""Writing that survives a crash: to the disk when the call returns, and never half a file under its own name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(f"{path.name}.partial")


def publish(path: Path) -> None:
    """Put the finished `partial(path)`, a file or a folder of files, in place of `path`."""
    written = partial(path)
    for entry in [*written.iterdir(), written] if written.is_dir() else [written]:
        sync(entry)
    if path.is_dir():
        remove(path)
    os.replace(written, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; a folder of ours also where it has been made read-only."""
    if path.is_dir() and not path.is_symlink():
        for folder in (path, *(entry for entry in path.rglob("*") if entry.is_dir() and not entry.is_symlink())):
            folder.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file in one piece: a reader finds the old one or the new one, and after a failure the old one."""
    try:
        partial(path).write_text(text, encoding="utf-8")
        publish(path)
    finally:
        remove(partial(path))


def write_file(path: Path, content: bytes) -> None:
    """Write a file under its own name, with the folders above it: for folders that get their name when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    sync(path)


def write_files(folder: Path, sources: Mapping[str, bytes]) -> list[str]:
    """Write each content to its path inside `folder`; the paths."""
    for name, content in sources.items():
        write_file(folder / name, content)
    return list(sources)


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same contents, with their paths inside `folder`."""
    return {f"{folder}/{name}": content for name, content in files.items()}
