"""Text to ids, with their places, under `TextRules`, in the order in which transformers applies them.

The text is cut at added tokens that are not `normalized`; what is between is lower-cased, brought into SentencePiece's
normal form, cut at the `normalized` ones, then at punctuation; every part is a beginning of a word to SentencePiece.
Which occurrences of an added token count is decided by the `tokenizers` library itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec
from tokenizers import normalizers, pre_tokenizers

from deberta_xl.data.text_rules import AddedToken, TextRules
from deberta_xl.data.words import WORD_MARK

#: A name that no text has, for what is between added tokens.
BETWEEN = "\uffff"
#: Nothing combines with it, so what follows it is normalised as if it stood alone, and keeps a space at its beginning.
GUARD = "0"


class Part(NamedTuple):
    """A part of a text: an added token, or what is between two of them."""

    token_id: int | None
    start: int
    stop: int


class Token(NamedTuple):
    """An id, and the characters of the text that it stands for."""

    id: int
    start: int
    stop: int


class Places(NamedTuple):
    """A text made of another one."""

    text: str
    origin: Sequence[int]
    """For each character, and behind the last one, its place in the original; [len(text) + 1]."""

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The characters of the original that `text[start:stop]` is made of, all of each; empty for an empty text."""
        if start == stop:
            return self.origin[start], self.origin[start]
        last = stop - 1
        while stop < len(self.text) and self.origin[stop] == self.origin[last]:
            stop += 1
        return self.origin[start], self.origin[stop]


class Stretch(NamedTuple):
    """An added token, or what SentencePiece is to cut at once."""

    token_id: int | None
    normal: Places
    start: int
    stop: int
    has_mark: bool
    """Whether a word begins here without a space in the text."""

    def marked(self) -> str:
        """The text with U+2581 for spaces, as SentencePiece cuts it."""
        return WORD_MARK * self.has_mark + self.normal.text[self.start : self.stop].replace(" ", WORD_MARK)


def plain_processor(spm_model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The pieces of a model for text that is normalised already, with U+2581 for spaces."""
    model = ModelProto.FromString(spm_model)
    as_it_is = NormalizerSpec(
        name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
    )
    model.normalizer_spec.CopyFrom(as_it_is)
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class Cutter:
    """Finds added tokens in a text."""

    def __init__(self, tokens: Sequence[AddedToken]):
        self.ids = {token.content: token.id for token in tokens}
        self.engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({BETWEEN: 0}, unk_token=BETWEEN))
        self.engine.add_tokens(
            [
                tokenizers.AddedToken(
                    t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=False
                )
                for t in tokens
            ]
        )

    def __call__(self, text: str) -> Iterator[Part]:
        """The parts of a text, in order and without gaps."""
        if not self.ids:
            if text:
                yield Part(None, 0, len(text))
            return
        found = self.engine.encode(text, add_special_tokens=False)
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            yield Part(self.ids[self.engine.id_to_token(number)] if number else None, start, stop)


class RuledEncoder:
    """SentencePiece's ids between added tokens."""

    def __init__(self, spm_model: bytes, processor: sentencepiece.SentencePieceProcessor, rules: TextRules):
        self.processor, self.rules = processor, rules
        self.pieces = plain_processor(spm_model)
        spec = ModelProto.FromString(spm_model).normalizer_spec
        self.begins_words, self.keeps_spaces = spec.add_dummy_prefix, not spec.remove_extra_whitespaces
        self.lowercase = normalizers.Lowercase()
        self.punctuation = pre_tokenizers.Punctuation("isolated")
        self.in_text = Cutter([token for token in rules.added if not token.normalized])
        found = [token for token in rules.added if token.normalized]
        self.in_normal_form = Cutter([t._replace(content=self.normalize(t.content).text) for t in found])

    def __call__(self, text: str, *, follows_mask: bool = False) -> Iterator[Token]:
        """The tokens of a text; with `follows_mask` its beginning begins a word only where it has a space."""
        for found in self.stretches(text, follows_mask=follows_mask):
            if found.token_id is not None:
                yield Token(found.token_id, *found.normal.span(found.start, found.stop))
                continue
            place = found.start - found.has_mark
            for piece in self.pieces.encode(found.marked(), return_type="proto").pieces:
                end = place + len(piece.surface)
                # Of a character's bytes only the last one counts it; all of them stand for it.
                behind = end + (self.pieces.is_byte(piece.id) and end == place)
                yield Token(piece.id, *found.normal.span(max(place, found.start), max(behind, found.start)))
                place = end

    def ids(self, text: str, *, follows_mask: bool = False) -> list[int]:
        """The ids alone, which are found faster."""
        ids: list[int] = []
        for found in self.stretches(text, follows_mask=follows_mask):
            ids += self.pieces.encode(found.marked()) if found.token_id is None else [found.token_id]
        return ids

    def stretches(self, text: str, *, follows_mask: bool) -> Iterator[Stretch]:
        """What a text is made of."""
        for part in self.in_text(text):
            if part.token_id is not None:
                yield Stretch(part.token_id, Places(text, range(len(text) + 1)), part.start, part.stop, False)
                continue
            normal = self.normalize(text[part.start : part.stop])
            normal = normal._replace(origin=[part.start + place for place in normal.origin])
            if not (self.begins_words or self.keeps_spaces or follows_mask) and normal.text.startswith(" "):
                normal = Places(normal.text[1:], normal.origin[1:])
            # Where superfluous spaces are kept, a beginning gets its mark besides, even where nothing follows.
            if self.keeps_spaces and self.begins_words and not normal.text and not follows_mask:
                yield Stretch(None, normal, 0, 0, True)
            for inner in self.in_normal_form(normal.text):
                if inner.token_id is not None:
                    yield Stretch(inner.token_id, normal, inner.start, inner.stop, False)
                    continue
                for first, last in self.words(normal.text[inner.start : inner.stop]):
                    first, last = inner.start + first, inner.start + last
                    is_first = part.start == first == 0
                    wants_mark = not (follows_mask if is_first else self.rules.first_word_only)
                    lacks_mark = first == 0 if self.keeps_spaces else normal.text[first] != " "
                    yield Stretch(None, normal, first, last, self.begins_words and wants_mark and lacks_mark)

    def normalize(self, text: str) -> Places:
        """SentencePiece's normal form, with spaces for U+2581; a space at the beginning stays."""
        lowered = self.lower(text) if self.rules.lower_case else Places(text, range(len(text) + 1))
        normal, origin = self.processor.normalize(GUARD + lowered.text, with_offsets=True)
        begin = normal.index(GUARD) + 1
        places = [lowered.origin[place - 1] for place in origin[begin:]]
        return Places(normal[begin:].replace(WORD_MARK, " "), places)

    def lower(self, text: str) -> Places:
        """The text in lower case, character by character as `tokenizers` does it."""
        if text.isascii():
            return Places(text.lower(), range(len(text) + 1))
        pieces = [self.lowercase.normalize_str(character) for character in text]
        origin = [number for number, piece in enumerate(pieces) for _ in piece]
        return Places("".join(pieces), [*origin, len(text)])

    def words(self, text: str) -> Iterator[tuple[int, int]]:
        """Where the parts are that punctuation leaves: all of the text, unless it splits."""
        if not self.rules.split_by_punct:
            yield 0, len(text)
            return
        for _, place in self.punctuation.pre_tokenize_str(text):
            yield place
