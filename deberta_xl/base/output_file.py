"""Where a tool writes what its user asked for: files appear whole, devices and pipes are written to as they are.

Every tool checks its outputs before its work, and writes them through `open_output`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from deberta_xl.base.durable import partial, publish, remove
from deberta_xl.base.errors import ConfigError

DESCRIPTORS = ("/dev/fd", "/proc/self/fd")
MAX_LINKS = 40
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}
"""Half a character, which no encoding has, is written as JSON writes it."""


def check_output(path: Path, inputs: Iterable[Path] = (), *, option: str = "--output") -> None:
    """Refuse a file to write that is an input (under whatever name), a folder, or in a folder that takes none.

    Raises ConfigError naming the option.
    """
    refuse_inputs(path, inputs, option)
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; choose the name of a file, for example {path / 'output'}")
    if is_stream(path):
        return
    check_writable(path.resolve().parent, f"{option} {path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path} is a file that may not be changed; choose another one")


def check_output_folder(folder: Path, *, option: str = "--output") -> None:
    """Refuse a folder to write files into that is none, or cannot be made. Raises ConfigError naming the option."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder} is a file; choose a folder")
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option} {folder}: {there} is a file, not a folder; choose another folder")
    check_writable(there, f"{option} {folder}")


def refuse_inputs(path: Path, inputs: Iterable[Path], option: str) -> None:
    """Refuse an output that is one of the files that are read: by its path, a link of either kind, or a mount.

    Of a folder that is read (a model, a run) every file counts that is there already.
    """
    if not path.is_file():
        return
    for given in inputs:
        if given.exists() and path.samefile(given):
            also = "" if str(path) == str(given) else f", also called {given}"
            raise ConfigError(f"{option} {path} is read as an input{also}, and would be lost; choose another file")
        if given.is_dir() and given.resolve() in path.resolve().parents:
            raise ConfigError(
                f"{option} {path} is a file of {given}, which is read, and would be lost; choose another file"
            )


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder in which no file can be made."""
    if not folder.is_dir():
        raise ConfigError(f"{what}: there is no folder {folder}; make it (mkdir -p {folder}), or choose another one")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{what}: no file can be made in {folder}: {error.strerror}; choose another folder") from None


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe or an open descriptor: something to write to, never to replace."""
    if descriptor_of(path) is not None:
        return True
    return path.exists() and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()


def descriptor_of(path: Path) -> int | None:
    """The descriptor of this process that a path like /dev/stdout or /dev/fd/63 means."""
    folders = {os.path.realpath(folder) for folder in DESCRIPTORS}
    for _ in range(MAX_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) in folders:
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


@contextlib.contextmanager
def open_output(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name when it is whole, and then replaces a regular file, through a symbolic link too.

    After a failure the old one is left. A device, a pipe or a descriptor is written to, at the place where it stands.
    """
    descriptor = descriptor_of(path)
    if descriptor is not None:
        sys.stdout.flush()
        with os.fdopen(os.dup(descriptor), "w", **TEXT) as file:
            yield file
        return
    if is_stream(path):
        with path.open("w", **TEXT) as file:
            yield file
        return
    target = path.resolve()
    try:
        with partial(target).open("w", **TEXT) as file:
            yield file
        if target.exists():
            shutil.copymode(target, partial(target))
        publish(target)
    finally:
        remove(partial(target))


def write_output(path: Path, text: str) -> None:
    """Write a whole text through `open_output`."""
    with open_output(path) as file:
        file.write(text)


def report_stream(path: Path) -> TextIO:
    """Where a tool says what it wrote: standard output, but standard error where that may be what was written to."""
    return sys.stderr if is_stream(path) else sys.stdout
