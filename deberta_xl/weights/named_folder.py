"""From what a user named to the folder that is read: of a run, its newest whole checkpoint; and to its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from deberta_xl.base.errors import ConfigError
from deberta_xl.checkpoint.manifest import CheckpointError, step_folders
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign import is_foreign_folder, parse_config, read_config_fields, stated_learnt
from deberta_xl.weights.native import CONFIG_NAME, TOKENIZER_NAME, find_weights_folder
from deberta_xl.weights.native_config import Learnt, read_native_config
from deberta_xl.weights.pair import no_generator, split_part, with_part

Opened = TypeVar("Opened")


def find_pretrained(directory: str | Path) -> Path:
    """The folder with the weights behind what a user named, verified: of a run, its newest whole checkpoint."""
    directory = Path(directory).expanduser()
    if not split_part(directory)[0].is_dir():
        raise CheckpointError(f"{directory} is not a folder")
    return directory if is_foreign_folder(directory) else find_weights_folder(directory)


def peek(directory: str | Path, setting: str = "train.init") -> tuple[Path, DebertaConfig]:
    """The folder that a start from `directory` will read, as its name says, and the architecture in it.

    Nothing is verified: `find_pretrained` does that, once for all ranks. Raises ConfigError when it cannot be meant by
    `setting`.
    """
    folder = steps_or_itself(Path(directory))[0]
    place, part = split_part(folder)
    try:
        if not place.is_dir():
            raise CheckpointError(f"{place} is not a folder")
        if is_foreign_folder(folder):
            return folder, parse_config(read_config_fields(folder) or {}, folder)
        stated = read_native_config(place / CONFIG_NAME)
        if part == "generator" and stated.generator is None:
            raise CheckpointError(no_generator(place))
        return folder, stated.generator if part == "generator" else stated.architecture
    except CheckpointError as error:
        raise ConfigError(f"{setting}: {error}") from error


def learnt_in(folder: Path) -> Learnt:
    """How the model of a folder given by `find_pretrained` or `peek` was trained."""
    if is_foreign_folder(folder):
        return stated_learnt(read_config_fields(folder) or {}, folder)
    return read_native_config(split_part(folder)[0] / CONFIG_NAME).learnt


def steps_or_itself(directory: Path) -> list[Path]:
    """The checkpoints of a run, newest first, each with the part that is named; any other folder as it is."""
    folder, part = split_part(directory)
    return [with_part(step, part) for step in step_folders(folder / "checkpoints")] or [directory]


def first_that_opens(directory: Path, opened: Callable[[Path], Opened]) -> tuple[Path, Opened]:
    """A folder, or the newest checkpoint of a run that can be opened, as the start will find it; and what that gave.

    Raises ConfigError for why the newest cannot be.
    """
    failures = []
    for folder in steps_or_itself(directory):
        try:
            return folder, opened(folder)
        except CheckpointError as error:
            failures.append(error)
    raise ConfigError(f"train.init: {failures[0]}") from failures[0]


def tokenizer_folders(checkpoint: Path) -> Iterator[Path]:
    """Where a checkpoint has a tokenizer: `tokenizer/` in our layouts, the folder itself in the others."""
    checkpoint, _ = split_part(checkpoint)
    return (folder for folder in (checkpoint / TOKENIZER_NAME, checkpoint) if (folder / MODEL_FILE).is_file())


def find_tokenizer(checkpoint: Path) -> Path:
    """The tokenizer's folder of a checkpoint. Raises CheckpointError when there is none."""
    for folder in tokenizer_folders(checkpoint):
        return folder
    raise CheckpointError(
        f"{checkpoint} has no tokenizer ({MODEL_FILE}): copy its base model's there, which transformers does not save, "
        "or give its folder with --tokenizer to tools/evaluate.py, tools/fill_mask.py or tools/generate.py"
    )


def tokenizer_for(checkpoint: Path, given: Path | None) -> Tokenizer:
    """The tokenizer of a checkpoint, or the one `given` for a checkpoint that has none.

    Raises CheckpointError when there is none, or when the checkpoint has another one than the one given: its ids would
    mean other pieces.
    """
    if given is None:
        return Tokenizer.load(find_tokenizer(checkpoint))
    tokenizer = Tokenizer.load(given)
    own = next(tokenizer_folders(checkpoint), None)
    if own is not None and not Tokenizer.load(own).has_same_ids(tokenizer):
        raise CheckpointError(f"--tokenizer {given} is not the checkpoint's own, {own}; leave --tokenizer out")
    return tokenizer
