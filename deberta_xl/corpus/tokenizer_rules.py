"""How text becomes pieces: what a user may choose when a tokenizer is trained."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import NormalizerSpec

from deberta_xl.base.errors import TokenizerError
from deberta_xl.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, WORD_MARK

NORMALIZATIONS = {
    "nmt_nfkc": "NFKC; tabs, line ends and invisible characters become spaces or vanish",
    "nfkc": "NFKC; tabs and line ends become spaces",
    "nmt_nfkc_cf": "as nmt_nfkc, in lower case",
    "nfkc_cf": "as nfkc, in lower case",
    "identity": "as it is written; tabs and line ends become spaces",
}
ALPHABET_CHARACTERS = 3000
"""Up to so many different characters a text is written in alphabets, and all are kept unless a user says otherwise."""
FULL_COVERAGE, PARTIAL_COVERAGE = 1.0, 0.9995
SMALLEST_COVERAGE = 0.98
"""SentencePiece's own limit."""
LINE_ENDS = "\t\n\v\f\r\x85\u2028\u2029"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, kw_only=True)
class TokenizerRules:
    """What a tokenizer keeps, changes and never cuts. Raises TokenizerError for what cannot be."""

    character_coverage: float | None = None
    """Share of the text's characters that get pieces, the frequent ones first; None: chosen by their number."""
    byte_fallback: bool = False
    """Other characters become pieces for their bytes, instead of [UNK]."""
    normalization: str = "nmt_nfkc"
    """One of NORMALIZATIONS."""
    user_symbols: tuple[str, ...] = ()
    """Strings that are always one piece."""
    split_digits: bool = False
    """Each digit is a piece of its own."""

    def __post_init__(self) -> None:
        coverage = self.character_coverage
        if coverage is not None and not SMALLEST_COVERAGE <= coverage <= 1:
            raise TokenizerError(
                f"--character_coverage {coverage} is no share of characters; allowed: {SMALLEST_COVERAGE} … 1"
            )
        if self.normalization not in NORMALIZATIONS:
            raise TokenizerError(f"--normalization {self.normalization}: choose one of {', '.join(NORMALIZATIONS)}")
        for symbol, count in Counter(self.user_symbols).items():
            if count > 1:
                raise TokenizerError(f"user symbol {symbol!r} is given {count} times; once is enough")
            self.check_symbol(symbol)

    def check_symbol(self, symbol: str) -> None:
        """Refuse a user symbol that could not be one piece, here or in an exported tokenizer."""
        if not symbol or any(character.isspace() for character in symbol) or WORD_MARK in symbol:
            raise TokenizerError(f"user symbol {symbol!r} is empty or holds a space; symbols are pieces within a word")
        if symbol in (*SPECIAL_PIECES, MASK_PIECE) or BYTE_PIECE.fullmatch(symbol):
            raise TokenizerError(f"user symbol {symbol!r} is a name of the tokenizer's own; choose another")
        if any("\ud800" <= character <= "\udfff" for character in symbol):
            raise TokenizerError(f"user symbol {symbol!r} is not UTF-8; type it, or convert it, in UTF-8")
        if (seen := normalizer_of(self.normalization).normalize(symbol)) != symbol:
            raise TokenizerError(
                f"user symbol {symbol!r} reads {seen!r} after --normalization {self.normalization}, which comes "
                f"first; give {seen!r}, or choose another normalization"
            )

    @property
    def composes(self) -> bool:
        """Whether normalisation puts letters and their marks together."""
        return self.normalization != "identity"

    def coverage_for(self, num_characters: int) -> float:
        """The share of characters to keep of a text with so many different ones."""
        if self.character_coverage is not None:
            return self.character_coverage
        return FULL_COVERAGE if num_characters <= ALPHABET_CHARACTERS else PARTIAL_COVERAGE

    def options(self, num_characters: int) -> dict[str, Any]:
        """SentencePiece's names for all that, for a text with so many different characters."""
        return {
            "character_coverage": self.coverage_for(num_characters),
            "byte_fallback": self.byte_fallback,
            "normalization_rule_name": self.normalization,
            "user_defined_symbols": list(self.user_symbols),
            "split_digits": self.split_digits,
        }


@functools.cache
def normalizer_of(normalization: str) -> sentencepiece.SentencePieceNormalizer:
    """SentencePiece's normaliser of that name, without its treatment of spaces."""
    return sentencepiece.SentencePieceNormalizer(
        rule_name=normalization, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )


@functools.cache
def character_map(normalization: str) -> bytes | None:
    """The character map that also makes spaces of tabs and line ends; None where SentencePiece's own does.

    A document of several lines is tokenised as one text, but SentencePiece learns from lines: without this, every line
    end would be [UNK].
    """
    if normalization.startswith("nmt"):
        return None
    changes = [] if normalization == "identity" else normalizer_of(normalization).Decompile()
    sentencepiece.set_min_log_level(2)
    made = sentencepiece.SentencePieceNormalizer(norm_map=[*changes, *((end, " ") for end in LINE_ENDS)])
    return NormalizerSpec.FromString(made.serialized_normalizer_spec()).precompiled_charsmap
