"""Generated text's two ends: a prompt as the model reads it, and tokens as people read them."""

from __future__ import annotations

import codecs
from typing import NamedTuple

from deberta_xl.base.errors import UserError
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.room import Room


class GenerationError(UserError):
    """A prompt, or a model, with which nothing can be written."""


class Prompt(NamedTuple):
    """A text to go on from."""

    number: int
    """Among all prompts; what is drawn depends on it, not on the batch."""
    text: str
    """Without spaces at its end that the model does not see: the next word brings its own."""
    token_ids: list[int]
    """With [CLS] before them."""


def read_prompt(text: str, number: int, tokenizer: Tokenizer, room: Room) -> Prompt:
    """A prompt as a model reads it.

    Raises GenerationError, naming it by its number, for one that is no good.
    """
    name = f"prompt {number + 1}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise GenerationError(f"{name} is not UTF-8; type it, or convert it, in UTF-8")
    ids = tokenizer.encode(text).tolist()
    if not ids:
        raise GenerationError(f"{name} is empty; write how the text is to begin, be it one letter")
    if len(ids) + 2 > room.length:
        raise GenerationError(
            f"{name} has {len(ids)} tokens; with [CLS] before them and at least one after them they do not fit into "
            f"{room.name}; shorten it to {room.length - 2} tokens{room.way_out}"
        )
    bare = text.rstrip()
    if bare != text and tokenizer.encode(bare).tolist() == ids:
        text = bare
    return Prompt(number, text, [tokenizer.cls_id, *ids])


class Speller:
    """Tokens to text, as they come: a character whose bytes come one by one appears with the last of them."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def spell(self, token_id: int) -> str:
        """What a token adds to the text."""
        byte = self.tokenizer.byte_of(token_id)
        if byte is None:
            return self.end() + self.tokenizer.surface(token_id)
        return self.decoder.decode(bytes([byte]))

    def end(self) -> str:
        """U+FFFD where bytes have come that are no whole character."""
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text
