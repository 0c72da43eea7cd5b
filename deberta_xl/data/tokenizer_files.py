"""The files of a tokenizer's folder: which they are, and their contents for a copy.

A folder that people name may be a whole release: weights, a `.git`, credentials, links to other disks. Of it only these
files are ever read, and they are copied as contents: no links, no modes, nothing else. A pipe or a device under one of
their names is no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deberta_xl.base.errors import TokenizerError
from deberta_xl.base.small_file import read_json, read_small

MODEL_FILE = "spm.model"
SETTINGS_FILE = "tokenizer_settings.json"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
VOCABULARY_FILE = "vocab.json"
"""Of v1's byte-level BPE."""
TOKENIZER_FILES = (
    MODEL_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    CONFIG_FILE,
    SPECIALS_FILE,
    ADDED_FILE,
    VOCABULARY_FILE,
    "merges.txt",
)
"""All that travels of a tokenizer; v1's `bpe_encoder.bin` is a pickle and stays behind."""


def unread_files(folder: Path) -> dict[str, bytes]:
    """Name → content of a tokenizer's files as they are: for those that are not SentencePiece's (v1's)."""
    return {name: read_small(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def remedy(folder: Path) -> str:
    """What to do about a folder without `spm.model`: one with another tokenizer's files had better keep its ids."""
    if (folder / VOCABULARY_FILE).is_file():
        return f"{VOCABULARY_FILE} is that of a byte-level BPE tokenizer (DeBERTa v1's), which cannot be read here"
    if (folder / TOKENIZER_FILE).is_file():
        return (
            f"its {TOKENIZER_FILE} does not suffice: copy the {MODEL_FILE} of the release that it was made from "
            "(another tokenizer would give other ids)"
        )
    return "make a tokenizer with tools/train_tokenizer.py"


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file. Raises TokenizerError for anything else in it."""
    if not path.is_file():
        return None
    try:
        fields = read_json(path)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is damaged: {error!r}; restore it, or delete it if it does not matter") from None
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} holds no JSON object; restore it, or delete it if it does not matter")
    return fields
