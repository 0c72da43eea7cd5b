"""What a tokenizer does to a text besides SentencePiece: added tokens, lower-casing, splitting at punctuation.

Tokenizers trained here have no such rules. Those of transformers may: `foreign_tokenizer.py` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

SHOWN = 8
"""Added tokens that a message names."""


class AddedToken(NamedTuple):
    """A text that is one token wherever it occurs; the flags are those of the `tokenizers` library."""

    content: str
    id: int
    single_word: bool = False
    """Not within a word."""
    lstrip: bool = False
    """Spaces before it belong to it."""
    rstrip: bool = False
    """Spaces behind it belong to it."""
    normalized: bool = False
    """Looked for in normalised text rather than in the text as it is."""
    special: bool = False
    """Never predicted."""


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """The rules of one tokenizer."""

    lower_case: bool = False
    split_by_punct: bool = False
    """Each punctuation character is a word of its own."""
    first_word_only: bool = False
    """Only a text's first word gets a space, not every word behind an added token."""
    added: tuple[AddedToken, ...] = ()
    """By id; without [PAD], [CLS], [SEP], [UNK] and [MASK], which are never read from text."""

    @property
    def is_plain(self) -> bool:
        """Whether the ids are SentencePiece's."""
        return not (self.lower_case or self.split_by_punct or self.added)

    def effective(self) -> TextRules:
        """The same rules without what has no effect: equal for equal ids."""
        return TextRules() if self.is_plain else self

    def describe(self) -> str:
        """In words, for a message."""
        shown = [f"{token.content!r} ({token.id})" for token in self.added[:SHOWN]] + ["…"] * (len(self.added) > SHOWN)
        words = ["lower-cases"] * self.lower_case + ["splits at punctuation"] * self.split_by_punct
        words += [f"adds {', '.join(shown)}"] if shown else []
        return " and ".join(words) or "has no added tokens, no lower-casing, no splitting at punctuation"

    def to_json(self) -> dict[str, Any]:
        """For `tokenizer_settings.json`."""
        return vars(self) | {"added": [token._asdict() for token in self.added]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TextRules:
        """From `to_json`. Raises KeyError or TypeError for anything else."""
        return cls(**fields | {"added": tuple(AddedToken(**token) for token in fields["added"])})


PLAIN = TextRules()
"""None at all."""
