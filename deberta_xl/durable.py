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
        shutil.rmtree(path)
    os.replace(written, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
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


def write_files(folder: Path, sources: Mapping[str, Path | bytes]) -> list[str]:
    """Write each content, or copy each file or folder, to its path inside `folder`; the paths of all files written."""
    names = []
    for name, source in sources.items():
        if isinstance(source, bytes):
            write_file(folder / name, source)
            names.append(name)
        elif source.is_dir():
            names += write_files(folder, {f"{name}/{child.name}": child for child in sorted(source.iterdir())})
        else:
            write_file(folder / name, source.read_bytes())
            names.append(name)
    return names
