"""Native weights to a Hugging Face folder: `deberta-v2`, loaded by transformers' `AutoModel` and `AutoTokenizer`.

The tensors have the original release's names. The masked-LM head and the absolute positions ride along:
`AutoModelForMaskedLM` reads the head (`legacy: false` in the configuration) and applies it to the last layer, since
transformers has no enhanced mask decoder; `DebertaForMaskedLM.from_pretrained` reads everything, and loses nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deberta_xl.architecture import DebertaConfig
from deberta_xl.checkpoint.durable import sync_file, sync_folder, write_files
from deberta_xl.checkpoint.foreign import is_foreign_folder
from deberta_xl.checkpoint.foreign_config import to_huggingface_config
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.names import to_microsoft
from deberta_xl.checkpoint.native_config import read_native_config
from deberta_xl.checkpoint.tokenizer_export import json_bytes, tokenizer_files
from deberta_xl.checkpoint.weights import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME, find_weights_folder, read_weights
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.log import logger


def export_huggingface(source: Path, destination: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a native model as a Hugging Face folder: all of it, or nothing.

    `source` is a run folder (its newest whole checkpoint), a checkpoint or a weights folder. The weights are cast from
    its float32 to `dtype`.

    Raises CheckpointError when the source is damaged or cannot be expressed there, or when `destination` exists and is
    not empty; TokenizerError when the tokenizer cannot be expressed.
    """
    refuse_existing(destination)
    folder = find_source(source)
    config = read_native_config(folder / CONFIG_NAME)
    check_expressible(config)
    fields = to_huggingface_config(config) | {"dtype": str(dtype).removeprefix("torch.")}
    files = {CONFIG_NAME: json_bytes(fields)}
    if (folder / TOKENIZER_NAME).is_dir():
        tokenizer = Tokenizer.load(folder / TOKENIZER_NAME)
        files |= tokenizer_files(tokenizer, max_length=config.max_position_embeddings)
    else:
        logger.warning("%s has no tokenizer; the exported folder will have none", folder)
    weights = {to_microsoft(name): cast(name, weight, dtype) for name, weight in read_weights(folder).items()}
    write_folder(destination, weights, files)


def refuse_existing(destination: Path) -> None:
    """Raise CheckpointError when something is there already."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists already; choose another folder, or delete it")


def find_source(source: Path) -> Path:
    """The verified native folder behind what a user named."""
    if source.is_dir() and is_foreign_folder(source):
        raise CheckpointError(f"{source} is in the original release's or Hugging Face's layout already")
    return find_weights_folder(source)


def check_expressible(config: DebertaConfig) -> None:
    """Refuse what transformers' DeBERTa-v2 cannot hold; warn of what it computes differently."""
    if config.attention_size != config.hidden_size:
        raise CheckpointError(
            f"{config.num_heads} heads of {config.head_size} make {config.attention_size}, not hidden_size="
            f"{config.hidden_size}: transformers' DeBERTa-v2 has no such attention"
        )
    if config.embedding_width != config.hidden_size:
        logger.warning(
            "embedding_size=%d differs from hidden_size=%d: AutoModel loads the export, but transformers has no such "
            "masked-LM head for AutoModelForMaskedLM",
            config.embedding_width,
            config.hidden_size,
        )
    if config.relative_reach < config.max_position_embeddings:
        logger.warning(
            "transformers gives other values for sequences longer than max_relative_positions=%d (it reads a row of "
            "the relative table that is never trained)",
            config.relative_reach,
        )


def cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. Raises CheckpointError when it holds values beyond the range of `dtype`."""
    converted = weight.to(dtype)
    if not bool(torch.isfinite(converted).all()):
        reason = (
            f"values beyond the range of {dtype}; choose bfloat16" if bool(weight.isfinite().all()) else "NaN or inf"
        )
        raise CheckpointError(f"{name} holds {reason}")
    return converted


def write_folder(folder: Path, weights: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    """Write beside `folder`, then rename."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_files(partial, files)
        save_file(dict(weights), partial / WEIGHTS_NAME, {"format": "pt"})
        sync_file(partial / WEIGHTS_NAME)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
