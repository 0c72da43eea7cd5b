"""DeBERTa's tokenizer: SentencePiece pieces 0 … P−1 with PAD 0, CLS 1, SEP 2, UNK 3; [MASK] = P; then spare ids.

A folder holds `spm.model` and `tokenizer_settings.json`. The folder of a released DeBERTa is read, too: `spm.model`
alone, or with the files in which transformers keeps added tokens and other rules (`foreign_tokenizer.py`).

Literal special tokens in text, such as the letters "[MASK]", are ordinary text: SentencePiece cuts them into pieces
like any other string, so no document can forge a special id. `tools/preprocess.py` counts them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from deberta_xl.base.durable import partial, publish, remove, write_files
from deberta_xl.base.errors import TokenizerError
from deberta_xl.base.small_file import read_small
from deberta_xl.data.foreign_tokenizer import model_vocab_size, read_rules
from deberta_xl.data.ruled_encoder import RuledEncoder
from deberta_xl.data.text_rules import PLAIN, TextRules
from deberta_xl.data.tokenizer_files import MODEL_FILE, SETTINGS_FILE, remedy, unread_files
from deberta_xl.data.tokenizer_settings import TokenizerSettings
from deberta_xl.data.words import BEGINS, WORD_MARK, begins_word, word_flags
from deberta_xl.settings.architecture import PAD_ID

#: The specials by id; [MASK] comes after the pieces.
SPECIAL_PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MASK_PIECE = "[MASK]"


class Tokenizer:
    """Text to ids and back. `spm_model` is the serialised SentencePiece model; `vocab_size` counts the whole table;
    `rules` are what is done to a text besides.

    `special`, bool `[vocab_size]`: ids that are never predicted (the specials, those among the added tokens, and the
    spare ids).
    """

    pad_id, cls_id, sep_id, unk_id = range(PAD_ID, 4)

    def __init__(
        self,
        spm_model: bytes,
        vocab_size: int | None = None,
        source: str = MODEL_FILE,
        rules: TextRules = PLAIN,
    ):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
        except RuntimeError as error:
            raise TokenizerError(f"{source} is not a SentencePiece model, or is damaged") from error
        self.spm_model, self.rules = spm_model, rules.effective()
        self.num_pieces = self.processor.get_piece_size()
        self.mask_id = self.num_pieces
        self.added = {token.id: token for token in self.rules.added}
        self.num_named = max(self.mask_id, *self.added) + 1 if self.added else self.mask_id + 1
        self.vocab_size = vocab_size or self.num_named
        self.check(source)
        ordinary = range(len(SPECIAL_PIECES), self.num_pieces)
        self.special = np.ones(self.vocab_size, bool)
        self.special[ordinary] = False
        for token in self.rules.added:
            self.special[token.id] = token.special

    @functools.cached_property
    def word_flags(self) -> np.ndarray:
        """What each id does to the words around it, uint8 `[vocab_size]`; specials, added and spare ids begin one."""
        return self.table_of(self.flags_of_piece, BEGINS, np.uint8)

    @functools.cached_property
    def original_word_starts(self) -> np.ndarray:
        """Ids that begin a word by the original's rule, bool `[vocab_size]`."""
        return self.table_of(lambda number: begins_word(self.processor.id_to_piece(number)), True, bool)

    def table_of(self, value_of: Callable[[int], Any], other: Any, dtype: type) -> np.ndarray:
        """A table by id of what is said of ordinary pieces; `other` for all other ids."""
        table = np.full(self.vocab_size, other, dtype)
        ordinary = range(len(SPECIAL_PIECES), self.num_pieces)
        table[ordinary] = list(map(value_of, ordinary))
        table[list(self.added)] = other
        return table

    def flags_of_piece(self, number: int) -> int:
        """`word_flags` of a piece."""
        return word_flags(self.processor.id_to_piece(number), self.byte_of(number))

    @property
    def word_starts(self) -> np.ndarray:
        """Ids that begin a word wherever they stand, bool `[vocab_size]`."""
        return self.word_flags & BEGINS > 0

    @property
    def says_something(self) -> np.ndarray:
        """Ids that something can be learned from, bool `[vocab_size]`: not the specials, and not a space alone."""
        table = ~self.special
        table[self.processor.piece_to_id(WORD_MARK)] = False
        return table

    def check(self, source: str) -> None:
        """Refuse a model without DeBERTa's special ids, or a table too small for its pieces."""
        found = tuple(self.processor.id_to_piece(i) for i in range(min(self.num_pieces, len(SPECIAL_PIECES))))
        if found != SPECIAL_PIECES:
            raise TokenizerError(
                f"{source} is not a DeBERTa tokenizer: ids 0 to 3 are {' '.join(found)}, "
                f"not {' '.join(SPECIAL_PIECES)}; train one with tools/train_tokenizer.py"
            )
        if not self.processor.is_unknown(self.processor.piece_to_id(MASK_PIECE)):
            raise TokenizerError(
                f"{source} has a piece {MASK_PIECE}, id {self.processor.piece_to_id(MASK_PIECE)}: here it is no piece "
                f"but the id behind all pieces, {self.num_pieces}; such a model cannot be used"
            )
        if self.vocab_size <= self.num_pieces:
            raise TokenizerError(
                f"vocab_size={self.vocab_size} is too small for {source}: "
                f"{self.num_pieces} pieces and [MASK] need at least {self.num_pieces + 1}"
            )
        if self.vocab_size < self.num_named:
            token = self.added[self.num_named - 1]
            raise TokenizerError(
                f"vocab_size={self.vocab_size} is too small for {source}: the added token {token.content!r} is "
                f"{token.id}; a model that was not resized for it has no row for it"
            )

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Read a tokenizer folder; `vocab_size` only where there is no `tokenizer_settings.json`.

        There its default is that of a model's `config.json` beside `spm.model`, or the number of ids that have a name.
        Raises TokenizerError when files are missing, damaged, do not belong together or ask for what is not done here.
        """
        folder = Path(folder)
        model_path = folder / MODEL_FILE
        if not model_path.is_file():
            raise TokenizerError(f"{folder} holds no {MODEL_FILE}; {remedy(folder)}")
        spm_model = read_small(model_path)
        settings_path = folder / SETTINGS_FILE
        foreign = read_rules(folder, spm_model)
        rules = foreign or PLAIN
        if not settings_path.is_file():
            vocab_size = vocab_size or model_vocab_size(folder)
        else:
            settings = TokenizerSettings.read(settings_path)
            if settings.spm_sha256 != hashlib.sha256(spm_model).hexdigest():
                raise TokenizerError(f"{model_path} is damaged, or not the model that {SETTINGS_FILE} was written for")
            if vocab_size not in (None, settings.vocab_size):
                raise TokenizerError(f"vocab_size={vocab_size}, but {settings_path} says {settings.vocab_size}")
            vocab_size, rules = settings.vocab_size, settings.rules
            if foreign is not None and foreign.effective() != rules.effective():
                raise TokenizerError(
                    f"by {settings_path} the tokenizer {rules.describe()}; by the other files beside it, it "
                    f"{foreign.describe()}. Delete {SETTINGS_FILE} if they are newer, or them if they are not"
                )
        return cls(spm_model, vocab_size, str(model_path), rules)

    def save(self, folder: str | Path) -> None:
        """Write `spm.model` and `tokenizer_settings.json`; the folder appears whole, replacing an older one."""
        folder = Path(folder)
        written = partial(folder)
        remove(written)
        try:
            write_files(written, self.files())
            publish(folder)
        finally:
            remove(written)

    def files(self) -> dict[str, bytes]:
        """Name → content of the folder's files."""
        settings = TokenizerSettings(self.vocab_size, hashlib.sha256(self.spm_model).hexdigest(), self.rules)
        return {MODEL_FILE: self.spm_model, SETTINGS_FILE: settings.content(self.num_pieces)}

    @functools.cached_property
    def encoder(self) -> RuledEncoder:
        """Text to ids step by step: slower than SentencePiece in one go, and aware of rules and places."""
        return RuledEncoder(self.spm_model, self.processor, self.rules)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model, the rules and the size of the table: equal fingerprints give equal ids."""
        rules = "" if self.rules.is_plain else json.dumps(self.rules.to_json(), sort_keys=True)
        return hashlib.sha256(self.spm_model + f"{rules}vocab_size={self.vocab_size}".encode()).hexdigest()

    def has_same_ids(self, other: Tokenizer) -> bool:
        """Whether both give the same ids to every text, whatever the size of their tables."""
        return (self.spm_model, self.rules) == (other.spm_model, other.rules)

    @property
    def special_ids(self) -> dict[str, int]:
        """Name -> id of the specials."""
        return {piece: number for number, piece in enumerate(SPECIAL_PIECES)} | {MASK_PIECE: self.mask_id}

    def difference_from(self, other: Tokenizer) -> str:
        """In words: what ids, up to the last with a name, stand for in `other` ("there") and in this one ("here")."""
        theirs, ours = ([t.id_to_piece(i) for i in range(t.num_named)] for t in (other, self))
        different = [i for i, (there, here) in enumerate(zip(theirs, ours, strict=False)) if there != here]
        if different:
            example = f"{different[0]} for {theirs[different[0]]!r} there, {ours[different[0]]!r} here"
            return f"{len(different)} ids stand for other pieces, e.g. {example}"
        if self.rules != other.rules:
            return f"it {other.rules.describe()} there, and here it {self.rules.describe()}"
        return "it has the same pieces, but other scores or another normalisation"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 `[tokens]`, without [CLS] and [SEP]."""
        if not self.rules.is_plain:
            return np.array(self.encoder.ids(text), np.int32)
        return np.array(self.processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in one call and one thread (processes are the unit of parallel preprocessing)."""
        if not self.rules.is_plain:
            return [self.encode(text) for text in texts]
        return [np.array(ids, np.int32) for ids in self.processor.encode(list(texts), num_threads=1)]

    def encode_with_places(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text, and the first and behind-last character of each one in it, int64 `[tokens, 2]`.

        Spaces before a word belong to no token, and a word mark alone is empty. Each of several tokens that one
        character became has that character.
        """
        tokens = list(self.encoder(text))
        places = np.array([(token.start, token.stop) for token in tokens], np.int64).reshape(-1, 2)
        for place in places:
            while place[0] < place[1] and text[place[0]].isspace():
                place[0] += 1
        return [token.id for token in tokens], places

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; [PAD], [CLS], [SEP] and spare ids are left out, [MASK] and added tokens are written out."""
        text = ""
        whole = {self.mask_id, *self.added}
        for is_whole, run in itertools.groupby(map(int, ids), key=lambda i: i in whole):
            shown = [i for i in run if is_whole or self.unk_id <= i < self.num_pieces]
            if is_whole:
                text += "".join(f" {self.id_to_piece(i)}" for i in shown)
            elif shown:
                begins_with_space = self.processor.id_to_piece(shown[0]).startswith(WORD_MARK)
                text += " " * begins_with_space + self.processor.decode(shown)
        return text.strip()

    def id_to_piece(self, token_id: int) -> str:
        """The piece of an id; spare ids read `[SPARE n]`."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the table 0 … {self.vocab_size - 1}")
        if token_id < self.num_pieces:
            return self.processor.id_to_piece(int(token_id))
        if token_id in self.added:
            return self.added[token_id].content
        return MASK_PIECE if token_id == self.mask_id else f"[SPARE {token_id - self.mask_id}]"

    def byte_of(self, token_id: int) -> int | None:
        """The byte that an id stands for, of a character without a piece; None for all other ids."""
        if token_id < self.num_pieces and self.processor.is_byte(int(token_id)):
            return int(self.processor.id_to_piece(int(token_id))[1:-1], 16)
        return None

    def surface(self, token_id: int) -> str:
        """The text that an id stands for, with a space before a word; of a byte that is no character, nothing."""
        if (byte := self.byte_of(token_id)) is not None:
            return chr(byte) if byte < 0x80 else ""
        return self.id_to_piece(token_id).replace(WORD_MARK, " ")

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece, [UNK]'s when it is not in the vocabulary."""
        added = {token.content: token.id for token in self.rules.added}
        return (added | {MASK_PIECE: self.mask_id}).get(piece, self.processor.piece_to_id(piece))


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """Name → content of the files that a copy of a tokenizer's folder has: those of `Tokenizer`, or v1's unread.

    Raises TokenizerError as `Tokenizer.load` does.
    """
    return Tokenizer.load(folder).files() if (folder / MODEL_FILE).is_file() else unread_files(folder)
