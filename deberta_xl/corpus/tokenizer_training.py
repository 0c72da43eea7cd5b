"""Training a tokenizer with SentencePiece's unigram model and DeBERTa's special ids.

`vocab_size` counts the whole table of the model to be trained: the pieces, [MASK], and spare ids that a later user may
give a meaning without changing the table's shape. From 10,000 on, 100 ids are set aside as in the released DeBERTa-v2
(128,100 = 128,000 pieces + [MASK] + 99 spare); below, 8.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from deberta_xl.base.errors import TokenizerError
from deberta_xl.base.lock import one_writer
from deberta_xl.corpus.characters import CharacterCounts, unknown_to
from deberta_xl.corpus.piece_training import PieceTraining
from deberta_xl.corpus.tokenizer_rules import TokenizerRules, character_map
from deberta_xl.data.tokenizer import SPECIAL_PIECES, Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE, SETTINGS_FILE

#: Lines that SentencePiece keeps in memory; more are sampled down. Ten million are a few GB, and plenty.
MAX_LINES = 10_000_000
#: Characters of a training line; longer ones are cut at a space (SentencePiece would skip them silently).
MAX_LINE = 1000
#: The result depends on the number of threads (sums in another order), so it is fixed, whatever the machine.
NUM_THREADS = 8
SEED = 1
MAX_VOCAB_SIZE = 2**24
"""A thousand times what any released model has, and still a number that SentencePiece can count to."""
SCORE_STEP = 2.0**-8
"""Pieces' scores (log-probabilities, down to about -20) are multiples of this. Sums up to 2^16, some 5,000 pieces, are
then exact in SentencePiece's float32 and in float64 alike: of two splits with the same pieces in another order ("..."
and "." or "." and "...") every library takes the same one, and not the one that its rounding favours."""


def reserved_ids(vocab_size: int) -> int:
    """Ids of the table that are not pieces: [MASK] and the spare ones."""
    return 100 if vocab_size >= 10_000 else 8


def largest_vocab_size(num_pieces: int) -> int:
    """The largest table that needs no more than `num_pieces` pieces."""
    with_many = num_pieces + reserved_ids(10_000)
    return with_many if with_many >= 10_000 else min(9_999, num_pieces + reserved_ids(0))


Show = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""`show(description, total)` shows progress, and gives `advance(amount, note)`: `deberta_xl.base.progress.progress`."""


def show_nothing(description: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """No progress."""
    return contextlib.nullcontext(lambda amount, note="": None)


class TrainedTokenizer(NamedTuple):
    """A new tokenizer, and what it made of the characters of its text."""

    tokenizer: Tokenizer
    coverage: float
    """Share of the text's characters that was to be kept."""
    characters: dict[str, int]
    """Each character of the text with its count, most frequent first."""
    lost: dict[str, int]
    """Those among them that become [UNK]."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, rules: TokenizerRules, counts: CharacterCounts) -> TrainedTokenizer:
        """What a tokenizer, trained by `rules` on text of these characters, made of them."""
        characters = counts.found()
        lost = {character: characters[character] for character in unknown_to(tokenizer, characters)}
        return cls(tokenizer, rules.coverage_for(len(characters)), characters, lost)

    @property
    def single_characters(self) -> int:
        """Pieces that are one character, or one byte."""
        pieces = (self.tokenizer.id_to_piece(i) for i in range(len(SPECIAL_PIECES), self.tokenizer.num_pieces))
        return sum(len(piece) == 1 or self.tokenizer.processor.is_byte(i) for i, piece in enumerate(pieces, 4))


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    rules: TokenizerRules | None = None,
    max_lines: int = MAX_LINES,
    allow_smaller: bool = False,
    overwrite: bool = False,
    show: Show = show_nothing,
    counts: CharacterCounts | None = None,
) -> Tokenizer:
    """Train on `texts` and save the tokenizer in the folder `output`; the same texts give the same tokenizer.

    `counts` is filled with the characters of the text, for `TrainedTokenizer.of`.
    Raises TokenizerError, and writes nothing, when the folder holds files already (with `overwrite`: other files than a
    tokenizer's), or when the text does not hold enough different words for the vocabulary; the message then names the
    largest that works, which is taken instead where `allow_smaller`.
    """
    output, rules = Path(output).resolve(), rules or TokenizerRules()
    with one_writer(output.with_name(f"{output.name}.lock")):
        check_output(output, overwrite)
        spm_model = train_pieces(
            texts, vocab_size, max_lines, rules=rules, allow_smaller=allow_smaller, show=show, counts=counts
        )
        tokenizer = Tokenizer(spm_model, vocab_size)
        if tokenizer.num_pieces < vocab_size - reserved_ids(vocab_size):
            tokenizer = Tokenizer(spm_model, largest_vocab_size(tokenizer.num_pieces))
        tokenizer.save(output)
    return tokenizer


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists; with `overwrite`, one that is no tokenizer's folder, whose files would be lost."""
    if output.exists() and not output.is_dir():
        raise TokenizerError(f"{output} is a file; choose a folder to write")
    found = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
    if found and not overwrite:
        raise TokenizerError(f"{output} exists; choose another output, or --overwrite to replace it")
    if others := [name for name in found if name not in (MODEL_FILE, SETTINGS_FILE)]:
        raise TokenizerError(
            f"{output} holds other files than a tokenizer's, which --overwrite would delete: "
            f"{', '.join(others[:3])}; choose another output"
        )


def train_pieces(
    texts: Iterable[str],
    vocab_size: int,
    max_lines: int = MAX_LINES,
    *,
    rules: TokenizerRules | None = None,
    allow_smaller: bool = False,
    show: Show = show_nothing,
    counts: CharacterCounts | None = None,
) -> bytes:
    """The serialised SentencePiece model. Arguments and errors as of `train_tokenizer`."""
    rules = rules or TokenizerRules()
    num_pieces = vocab_size - reserved_ids(vocab_size)
    if num_pieces <= len(SPECIAL_PIECES):
        raise TokenizerError(f"vocab_size={vocab_size} is too small for a vocabulary; choose some thousands")
    if vocab_size > MAX_VOCAB_SIZE:
        raise TokenizerError(f"vocab_size={vocab_size} is no vocabulary; choose some thousands")
    if max_lines <= 100:
        raise TokenizerError(f"max_lines={max_lines} is too few to learn from; SentencePiece needs more than 100")
    characters = counts or CharacterCounts(composes=rules.composes)
    with PieceTraining(max_lines=max_lines, seed=SEED) as training:
        training.read(training_lines(characters.watch(texts)))
        options = fixed_options(num_pieces, max_lines, allow_smaller) | rules.options(len(characters.found()))
        try:
            with show("training the tokenizer", 100) as advance:
                model = training.train(options, advance, num_pieces)
        except TokenizerError as error:
            raise TokenizerError(explain(str(error), vocab_size)) from error
    return finished(model, rules)


def fixed_options(num_pieces: int, max_lines: int, allow_smaller: bool) -> dict[str, Any]:
    """SentencePiece's options that are no rules of the user's."""
    pad, cls, sep, unk = SPECIAL_PIECES
    return {
        "model_type": "unigram",
        "vocab_size": num_pieces,
        "hard_vocab_limit": not allow_smaller,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "pad_piece": pad,
        "bos_piece": cls,
        "eos_piece": sep,
        "unk_piece": unk,
        "input_sentence_size": max_lines,
        "shuffle_input_sentence": True,
        "max_sentence_length": 8 * MAX_LINE,
        "num_threads": NUM_THREADS,
        "minloglevel": 0,
    }


def finished(spm_model: bytes, rules: TokenizerRules) -> bytes:
    """The same model with scores rounded to SCORE_STEP, and a character map that leaves no line end unknown."""
    model = ModelProto.FromString(spm_model)
    for piece in model.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    if (changed := character_map(rules.normalization)) is not None:
        model.normalizer_spec.precompiled_charsmap = changed
    return model.SerializeToString()


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts, none longer than MAX_LINE characters."""
    for text in texts:
        for line in text.replace("\t", " ").split("\n"):
            while len(line) > MAX_LINE:
                cut = line.rfind(" ", 1, MAX_LINE)
                cut = cut if cut > 0 else MAX_LINE
                yield line[:cut]
                line = line[cut:]
            if not line.isspace() and line:
                yield line


def explain(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint in a user's words."""
    if found := re.search(r"too high \(\d+\).*?<= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is more than this text can fill: it is too small or too repetitive; "
            f"choose at most {largest_vocab_size(int(found[1]))}, or give more text"
        )
    if found := re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message):
        needed = int(found[2]) + reserved_ids(vocab_size)
        return (
            f"vocab_size={vocab_size} does not even hold the characters of this text; choose at least {needed}, "
            "or a smaller --character_coverage"
        )
    if "!sentences_.empty()" in message:
        return "the text holds no line to learn from; is the input empty, or is --json_key wrong?"
    return f"SentencePiece could not train vocab_size={vocab_size} on this text: {message}"
