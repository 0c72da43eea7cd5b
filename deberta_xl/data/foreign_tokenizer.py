"""The rules that transformers' files add to a released `spm.model`: read and kept, or refused by name.

| file | what is read |
|---|---|
| tokenizer.json | added tokens; pieces, normaliser, pre-tokeniser and frame, compared with what `spm.model` says |
| tokenizer_config.json | added_tokens_decoder, do_lower_case, split_by_punct, names of the special tokens, class |
| special_tokens_map.json, added_tokens.json | added tokens and names of the special tokens |
| config.json | vocab_size: the rows of the model's table |

A token may be named in several of them, with one id. Whatever says something that is not done here is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from deberta_xl.base.errors import TokenizerError
from deberta_xl.data.text_rules import AddedToken, TextRules
from deberta_xl.data.tokenizer_files import (
    ADDED_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    SPECIALS_FILE,
    TOKENIZER_FILE,
    read_object,
)
from deberta_xl.data.tokenizer_json import check_pieces, read_pipeline

MODEL_CONFIG_FILES = ("config.json", "model_config.json")
FOREIGN_FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIALS_FILE, ADDED_FILE)
OUR_CLASS = "PreTrainedTokenizerFast"
"""Of exported folders: there tokenizer.json alone decides."""
CLASSES = (None, "DebertaV2Tokenizer", "DebertaV2TokenizerFast", OUR_CLASS, "TokenizersBackend")
ROLES = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
FURTHER_ROLES = ("bos_token", "eos_token")
FURTHER_LISTS = ("additional_special_tokens", "extra_special_tokens")
#: Setting -> values with which it changes nothing.
IDLE_VALUES: dict[str, tuple[Any, ...]] = {
    "add_prefix_space": (None, True),
    "vocab_type": (None, "spm"),
    "unk_id": (None, 3),
    "truncation_side": (None, "right"),
    "split_special_tokens": (None, False),
    "auto_map": (None, {}),
}
IDLE_SAMPLING: dict[str, tuple[Any, ...]] = {"enable_sampling": (False,), "nbest_size": (0, 1, -1), "alpha": (0, 0.1)}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def model_vocab_size(folder: Path) -> int | None:
    """Rows of the model's word table, where its configuration lies beside the tokenizer."""
    for name in MODEL_CONFIG_FILES:
        fields = read_object(folder / name)
        if fields is not None and isinstance(size := fields.get("vocab_size"), int):
            return size
    return None


def read_rules(folder: Path, spm_model: bytes) -> TextRules | None:
    """The rules that a folder's foreign files give; None where there are no such files.

    `spm_model` is the content of its `spm.model`. Raises TokenizerError naming all that is not done here.
    """
    files = {name: read_object(folder / name) for name in FOREIGN_FILES}
    if all(fields is None for fields in files.values()):
        return None
    try:
        model = ModelProto.FromString(spm_model)
    except DecodeError as error:
        raise TokenizerError(f"{folder / MODEL_FILE} is not a SentencePiece model, or is damaged") from error
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    user_defined = frozenset(
        piece.piece for piece in model.pieces if piece.type == ModelProto.SentencePiece.USER_DEFINED
    )
    reader = ForeignFiles(folder, files, [piece for piece, _ in pieces], user_defined)
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    try:
        rules = reader.rules(pieces, model.normalizer_spec.precompiled_charsmap, processor)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        names = ", ".join(name for name, fields in files.items() if fields is not None)
        raise TokenizerError(
            f"{folder}: one of {names} has another form than transformers gives it ({error!r}); restore it, or delete "
            "it if it does not matter"
        ) from error
    if reader.problems:
        raise TokenizerError(
            f"{folder}: the tokenizer's files ask for what is not done here, so that its ids would be others: "
            f"{'; '.join(reader.problems)}. Where the model was trained without that, delete the setting or the file; "
            f"spm.model alone is a whole tokenizer"
        )
    return rules


class ForeignFiles:
    """The contents of a folder's foreign files, by name, and what is wrong with them."""

    def __init__(
        self,
        folder: Path,
        files: dict[str, dict[str, Any] | None],
        pieces: Sequence[str],
        user_defined: frozenset[str],
    ):
        self.folder, self.user_defined = folder, user_defined
        self.whole, self.config, self.specials, self.added = (files[name] for name in FOREIGN_FILES)
        self.ids = {piece: number for number, piece in enumerate(pieces)} | {ROLES["mask_token"]: len(pieces)}
        self.num_pieces = len(pieces)
        self.problems: list[str] = []

    def rules(
        self, pieces: Sequence[tuple[str, float]], charsmap: bytes, processor: sentencepiece.SentencePieceProcessor
    ) -> TextRules:
        """The rules, as far as there is no problem."""
        config = self.config or {}
        self.check_config(config)
        tokens = self.tokens()
        lower_case, split_by_punct = bool(config.get("do_lower_case")), bool(config.get("split_by_punct"))
        first_word_only = False
        if self.whole is not None:
            self.problems += check_pieces(self.whole, pieces, self.user_defined)
            pipeline = read_pipeline(self.whole, charsmap, lambda text: processor.normalize(text).replace("\u2581", ""))
            self.problems += pipeline.problems
            first_word_only = pipeline.first_word_only
            if config.get("tokenizer_class") == OUR_CLASS:
                lower_case, split_by_punct = pipeline.lower_case, pipeline.split_by_punct
            for name, said, done in (
                ("do_lower_case", lower_case, pipeline.lower_case),
                ("split_by_punct", split_by_punct, pipeline.split_by_punct),
            ):
                if said != done:
                    self.problems.append(
                        f"{CONFIG_FILE} says {name}={str(said).lower()}, {TOKENIZER_FILE} the contrary"
                    )
        return TextRules(
            lower_case=lower_case, split_by_punct=split_by_punct, first_word_only=first_word_only, added=tuple(tokens)
        )

    def check_config(self, config: dict[str, Any]) -> None:
        """Note settings that are not done here."""
        if config.get("tokenizer_class") not in CLASSES:
            self.problems.append(f"tokenizer_class is {config['tokenizer_class']!r}, which is not DeBERTa-v2's")
        for name, idle in IDLE_VALUES.items():
            if config.get(name) not in idle:
                self.problems.append(f"{name} is {config[name]!r}")
        for name, value in (config.get("sp_model_kwargs") or {}).items():
            if value not in IDLE_SAMPLING.get(name, ()):
                self.problems.append(f"sp_model_kwargs has {name}={value!r}")
        model = read_object(self.folder / MODEL_CONFIG_FILES[0]) or {}
        if model.get("vocab_type") not in IDLE_VALUES["vocab_type"]:
            self.problems.append(f"vocab_type is {model['vocab_type']!r} in {MODEL_CONFIG_FILES[0]}")
        for fields in (config, self.specials or {}):
            for role, expected in ROLES.items():
                if (found := content_of(fields.get(role))) not in (None, expected):
                    self.problems.append(f"{role} is {found!r}, not {expected!r}")

    def tokens(self) -> list[AddedToken]:
        """The added tokens, by id, each named once."""
        known: dict[str, AddedToken] = {}
        for source, token in [*self.numbered(), *self.named()]:
            before = known.setdefault(token.content, token)
            if before.id != token.id:
                self.problems.append(f"{source} gives {token.content!r} the id {token.id}, another file {before.id}")
            number = self.ids.get(token.content, token.id)
            if number != token.id:
                self.problems.append(f"{source} gives {token.content!r} the id {token.id}, spm.model {number}")
            elif token.content not in self.ids and token.id <= self.num_pieces:
                self.problems.append(f"{source} gives {token.content!r} the id {token.id}, which is another piece's")
        # SentencePiece itself never cuts the pieces that a user has defined.
        done = {*ROLES.values(), *self.user_defined}
        ours = [token for token in known.values() if token.content not in done]
        by_id = {token.id: token for token in ours}
        self.problems += [f"{t.content!r} and {by_id[t.id].content!r} have one id" for t in ours if by_id[t.id] != t]
        return [by_id[number] for number in sorted(by_id)]

    def numbered(self) -> Iterator[tuple[str, AddedToken]]:
        """Tokens that have an id in some file; first the file whose flags transformers takes."""
        for number, token in ((self.config or {}).get("added_tokens_decoder") or {}).items():
            yield CONFIG_FILE, self.with_flags(token, number)
        for token in (self.whole or {}).get("added_tokens") or []:
            yield TOKENIZER_FILE, self.with_flags(token, token.get("id"))
        special = {token.content for _, token in self.named(quiet=True)}
        for content, number in (self.added or {}).items():
            flags = {"content": content, "normalized": content not in special, "special": content in special}
            yield ADDED_FILE, self.with_flags(flags, number)

    def named(self, *, quiet: bool = False) -> Iterator[tuple[str, AddedToken]]:
        """Further special tokens that are given by name; their ids are in another file, or they are pieces."""
        numbers = dict(self.ids)
        if not quiet:
            numbers |= {token.content: token.id for _, token in self.numbered()}
        for source, fields in ((CONFIG_FILE, self.config or {}), (SPECIALS_FILE, self.specials or {})):
            lists = [fields.get(name) or [] for name in FURTHER_LISTS]
            entries = [entry for found in lists for entry in (found.values() if isinstance(found, dict) else found)]
            for entry in [*entries, *(fields[role] for role in FURTHER_ROLES if fields.get(role) is not None)]:
                content = content_of(entry)
                if content is None or (content not in numbers and not quiet):
                    self.problems.append(f"{source} names {content!r} as a special token, and no file gives its id")
                    continue
                flags = entry if isinstance(entry, dict) else {}
                token = {name: flags.get(name, False) for name in FLAGS} | {"content": content, "special": True}
                yield source, self.with_flags(token, numbers.get(content, 0))

    def with_flags(self, token: Any, number: Any) -> AddedToken:
        """A token from its fields in a file."""
        content = content_of(token)
        if not content or not str(number).isdigit():
            self.problems.append(f"an added token reads {token!r} with id {number!r}")
            return AddedToken(ROLES["pad_token"], 0)
        return AddedToken(content, int(number), **{name: bool(token.get(name, False)) for name in FLAGS})


def content_of(entry: Any) -> str | None:
    """The text of a token, which files give as text or as an object."""
    found = entry.get("content") if isinstance(entry, dict) else entry
    return found if isinstance(found, str) else None
