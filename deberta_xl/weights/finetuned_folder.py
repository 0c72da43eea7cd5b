"""Folders of fine-tuned models: a run's best weights, found and written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deberta_xl.checkpoint.manifest import step_folder_name
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.head_facts import HEAD_NAME, HeadFacts
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.native import CONFIG_NAME, TOKENIZER_NAME, read_weights, write_weights
from deberta_xl.weights.native_config import native_config, read_native_config

BEST_NAME = "best"


def best_or_itself(directory: Path) -> Path:
    """A fine-tuning run's best weights; what is none, as it is."""
    return directory / BEST_NAME if (directory / BEST_NAME).is_dir() else directory


def find_finetuned(directory: str | Path) -> Path:
    """The folder with the weights behind what a user named, verified: of a run, its best weights."""
    return find_pretrained(best_or_itself(Path(directory).expanduser()))


def write_finetuned(
    folder: Path, weights: Mapping[str, Tensor], config: DebertaConfig, facts: HeadFacts, tokenizer: Path | None
) -> None:
    """A weights folder of a fine-tuned model: all of it, or nothing."""
    write_weights(folder, weights, native_config(config), tokenizer, {HEAD_NAME: facts.to_json()})


def replace_best(run_folder: Path, best_step: int) -> None:
    """Write the weights of a run's best checkpoint into its folder `best`, in place of older ones."""
    source = run_folder / "checkpoints" / step_folder_name(best_step)
    shutil.rmtree(run_folder / BEST_NAME, ignore_errors=True)
    head = {name: (source / name).read_bytes() for name in (HEAD_NAME,) if (source / name).is_file()}
    config = native_config(read_native_config(source / CONFIG_NAME).architecture)
    write_weights(run_folder / BEST_NAME, read_weights(source), config, source / TOKENIZER_NAME, head)
