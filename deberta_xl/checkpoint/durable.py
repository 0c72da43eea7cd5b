"""Writing files so that they are on the disk, not only in memory, when the call returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write a file, with the folders above it, and force it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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


def sync_file(path: Path) -> None:
    """Force a file that somebody else wrote to the disk, and let those read it who can read its folder.

    safetensors makes its files private (mode 0600), whatever the umask.
    """
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, so that a new file or a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
