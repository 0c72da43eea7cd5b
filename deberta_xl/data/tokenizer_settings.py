"""`tokenizer_settings.json`: what a tokenizer's folder says beside the SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from deberta_xl.base.errors import TokenizerError
from deberta_xl.base.small_file import read_json
from deberta_xl.data.text_rules import PLAIN, TextRules

SETTINGS_VERSION = 1
VERSION_WITH_RULES = 2
"""Of a tokenizer with rules, which a program that knows only version 1 must not pass over."""


class TokenizerSettings(NamedTuple):
    """The settings of one tokenizer."""

    vocab_size: int
    """Ids of the whole table."""
    spm_sha256: str
    """Hash of the SentencePiece model that they are for."""
    rules: TextRules
    """What is done to a text besides."""

    def content(self, num_pieces: int) -> bytes:
        """The file, for a model of so many pieces; [MASK] is the id behind them."""
        rules = {} if self.rules.is_plain else {"rules": self.rules.to_json()}
        fields = {
            "version": VERSION_WITH_RULES if rules else SETTINGS_VERSION,
            "vocab_size": self.vocab_size,
            "pieces": num_pieces,
            "mask_id": num_pieces,
            "spm_sha256": self.spm_sha256,
            **rules,
        }
        return (json.dumps(fields, indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> TokenizerSettings:
        """The settings in a file. Raises TokenizerError when it is damaged, or of a version that is not known here."""
        try:
            fields = read_json(path)
            version = fields["version"]
            complete = {"vocab_size", "spm_sha256"} <= fields.keys()
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path} is damaged: {error!r}; restore it, or train the tokenizer again") from error
        if version not in (SETTINGS_VERSION, VERSION_WITH_RULES) or not complete:
            raise TokenizerError(
                f"{path} has format version {version}; this program reads versions {SETTINGS_VERSION} and "
                f"{VERSION_WITH_RULES} (vocab_size and spm_sha256 are required)"
            )
        try:
            rules = TextRules.from_json(fields["rules"]) if version == VERSION_WITH_RULES else PLAIN
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"{path} is damaged: {error!r}; restore it") from None
        return cls(fields["vocab_size"], fields["spm_sha256"], rules)
