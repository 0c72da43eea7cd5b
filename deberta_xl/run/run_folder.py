"""The run folder: everything a run keeps, in one place, written so that a crash at any moment leaves it readable."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from deberta_xl.base.durable import remove, replace_file
from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import logger
from deberta_xl.base.small_file import read_small
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.run.devices import device_name, device_versions
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import load_config, to_toml
from deberta_xl.settings.pretraining import RunConfig

State = Literal["running", "stopped", "diverged", "done"]
PACKAGES = ("torch", "deepspeed", "numpy", "sentencepiece", "safetensors", "tensorboard")


class RunFolder:
    """Paths and small files of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.environment = self.path / "environment.json"
        self.state_file = self.path / "STATE"
        self.latest = self.path / "LATEST"
        self.owner = self.path / "OWNER"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.tokenizer = self.path / "tokenizer"
        self.heartbeat = self.path / "heartbeat"
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log"
        self.profile = self.path / "profile"

    def prepare(self, config: RunConfig | FinetuneConfig, tokenizer: Path, facts: Mapping[str, Any]) -> None:
        """Create the folder, or take it over: the configuration that holds from now on, and what it runs on."""
        for folder in (self.path, self.tensorboard, self.heartbeat, self.checkpoints, self.log):
            make_folder(folder)
        if self.config.exists():
            try:
                report_changes(load_config(self.config, (), type(config)), config)
            except ConfigError as error:
                logger.warning("the configuration of this run's last start is replaced unread: %s", error)
        write_text(self.config, to_toml(config))
        write_text(self.environment, json.dumps(environment(facts), indent=2) + "\n")
        # Copied anew each time: a start that never came to a checkpoint may have had another one.
        copy = Tokenizer.load(tokenizer)
        with writing(self.tokenizer):
            copy.save(self.tokenizer)

    def is_unused(self) -> bool:
        """Whether no start has got as far as preparing this folder."""
        return not self.config.exists()

    def discard(self) -> None:
        """Remove what a start makes before its first step; the folder, too, where nothing else is in it."""
        files = (self.config, self.environment, self.owner, self.state_file)
        folders = (self.tensorboard, self.tokenizer, self.heartbeat, self.checkpoints)
        for path in (*files, *folders, *self.log.glob("rank-*.log")):
            with contextlib.suppress(OSError):  # another rank's last sign of life may come in between
                remove(path)
        for folder in (self.log, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write_latest(self, checkpoint: Path) -> None:
        """Note which checkpoint was saved last."""
        write_text(self.latest, checkpoint.name + "\n")

    def check_latest(self, newest: Path | None) -> None:
        """Compare the newest whole checkpoint with what was saved last.

        Raises ConfigError when all checkpoints are gone: a run never starts anew by mistake. Warns when the last is.
        """
        saved = read_small(self.latest).decode(errors="replace").strip() if self.latest.is_file() else None
        if saved and newest is None:
            raise ConfigError(
                f"{self.path} was trained up to {saved}, but {self.checkpoints} holds no checkpoint any more: restore "
                f"it, or choose another run.folder, or delete {self.path} to start from step 0"
            )
        if saved and newest is not None and newest.name < saved and not (self.checkpoints / saved).exists():
            logger.warning("%s, the checkpoint saved last, is missing; using %s", self.checkpoints / saved, newest)

    def write_state(self, state: State) -> None:
        """`running`, `stopped` (asked to, will resume), `diverged` (a person has to change something) or `done`."""
        write_text(self.state_file, state + "\n")


def make_folder(folder: Path) -> None:
    """Create a folder, with an error for people when that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.folder: cannot create {folder}: {error.strerror}; choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one piece."""
    with writing(path):
        replace_file(path, text)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain it to people when `path` cannot be written: a full disk is no fault of the program."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; mend that (make room, for example), and the same "
            "command continues from the newest checkpoint"
        ) from error


def report_changes(before: RunConfig | FinetuneConfig, now: RunConfig | FinetuneConfig) -> None:
    """Say which keys differ from the run's last start."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(now)
    changes = [
        f"{section}.{key} = {value!r} (was {old[section][key]!r})"
        for section, values in new.items()
        for key, value in values.items()
        if value != old[section][key]
    ]
    if changes:
        logger.warning("this run continues with a changed configuration: %s", "; ".join(changes))


def environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, revision and hardware of this start, with the caller's `facts` (layout, command, …)."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_revision": git_revision(),
        "host": platform.node(),
        "device": device_name(),
        **device_versions(),
        "cores": os.cpu_count(),
        **facts,
    }


def git_revision() -> str | None:
    """Revision of the code, marked `+changes` when the work tree differs from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, errors="replace", check=True
        ).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if status else "")
