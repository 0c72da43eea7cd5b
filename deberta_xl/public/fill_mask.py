"""Filling masks: what the pretrained model, with its enhanced mask decoder, proposes for each [MASK] of a text.

Shape suffixes of this file:
    B batch   S sequence   L masks in a batch   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from deberta_xl.base.errors import UserError
from deberta_xl.data.tokenizer import MASK_PIECE, WORD_MARK, Tokenizer
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.room import warn_of_length
from deberta_xl.public.text_batches import each_text, text_batches


class FillMaskError(UserError):
    """A text, or a checkpoint, with which no mask can be filled."""


class Guess(NamedTuple):
    """One proposal for one mask."""

    token_id: int
    """Its id; never a special or a spare one."""
    piece: str
    """SentencePiece's piece; U+2581 at its beginning stands for the space before a word."""
    probability: float
    """Share among the ordinary pieces."""
    text: str
    """The text with the mask replaced; other masks are left as they are."""


def fill_mask(model: DebertaForMaskedLM, tokenizer: Tokenizer, text: str, *, top_k: int = 5) -> list[list[Guess]]:
    """`fill_masks` of one text."""
    return fill_masks(model, tokenizer, [text], top_k=top_k)[0]


def fill_masks(
    model: DebertaForMaskedLM, tokenizer: Tokenizer, texts: Sequence[str], *, top_k: int = 5
) -> list[list[list[Guess]]]:
    """Of each text, for each `[MASK]`, from left to right, the `top_k` most probable pieces, best first.

    Masks are filled independently of each other. `[MASK]` stands for one piece with the space before it; a longer word
    takes several masks. A text longer than the rows of the model's training is filled with a warning.

    Raises FillMaskError for a text without mask or longer than the position table, an impossible `top_k`, a tokenizer
    larger than the model's vocabulary, or outputs that are not finite numbers.
    """
    ordinary = check(model, tokenizer, top_k)
    ids_of = each_text(texts, partial(read, model, tokenizer), FillMaskError)
    warn_of_length(model.learnt, max(map(len, ids_of), default=0))
    allowed_V = torch.from_numpy(ordinary).to(model.head.bias.device)
    found: list[list[list[Guess]]] = [[] for _ in texts]
    for numbers, input_ids_BS, segments_BS in text_batches(ids_of, allowed_V.device, "filling masks"):
        is_mask_BS = input_ids_BS == tokenizer.mask_id
        with torch.no_grad():
            # Any label above 0 asks for a prediction; the loss is not used.
            logits_LV = model(input_ids_BS, segments_BS, labels=is_mask_BS.long()).logits
        if not bool(logits_LV.isfinite().all()):
            raise FillMaskError(
                "the model's outputs are not finite numbers: its training has diverged or its weights are damaged; "
                "take an earlier checkpoint"
            )
        best = torch.softmax(logits_LV[:, allowed_V], dim=-1).topk(top_k)
        pieces = zip(best.values.tolist(), allowed_V[best.indices].tolist(), strict=True)
        for number, count in zip(numbers, is_mask_BS.sum(1).tolist(), strict=True):
            of_text = enumerate(islice(pieces, count))
            found[number] = [list(guesses(tokenizer, texts[number], mask, *best_ones)) for mask, best_ones in of_text]
    return found


def read(model: DebertaForMaskedLM, tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, after refusing what cannot be filled."""
    if MASK_PIECE not in text:
        raise FillMaskError(f"the text has no {MASK_PIECE}; write it where a piece is wanted: The capital of [MASK] is")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise FillMaskError("the text is not UTF-8; type it, or convert it, in UTF-8")
    input_ids = encode_with_masks(tokenizer, text)
    if len(input_ids) > model.config.max_position_embeddings:
        raise FillMaskError(
            f"the text has {len(input_ids)} tokens, the model's position table {model.config.max_position_embeddings}; "
            "shorten the text"
        )
    return input_ids


def check(model: DebertaForMaskedLM, tokenizer: Tokenizer, top_k: int) -> np.ndarray:
    """The ids that may be proposed, after refusing what cannot be meant."""
    ordinary = np.flatnonzero(~tokenizer.special)
    if not 1 <= top_k <= ordinary.size:
        raise FillMaskError(f"top_k={top_k} is impossible; allowed: 1 … {ordinary.size} (the tokenizer's pieces)")
    if tokenizer.mask_id >= model.config.vocab_size:
        raise FillMaskError(
            f"the tokenizer has {tokenizer.mask_id + 1} ids, the model only {model.config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    return ordinary


def guesses(
    tokenizer: Tokenizer, text: str, number: int, probabilities: list[float], ids: list[int]
) -> Iterator[Guess]:
    """The proposals for mask `number`."""
    for probability, token_id in zip(probabilities, ids, strict=True):
        piece = tokenizer.id_to_piece(token_id)
        yield Guess(token_id, piece, probability, put(piece, text, number))


def put(piece: str, text: str, number: int) -> str:
    """`text` with mask `number` replaced: the piece brings its own space, or stands close to what is before it."""
    parts = text.split(MASK_PIECE)
    before = MASK_PIECE.join(parts[: number + 1]).rstrip()
    space = " " if before and piece.startswith(WORD_MARK) else ""
    return before + space + piece.removeprefix(WORD_MARK) + MASK_PIECE.join(parts[number + 1 :])


def encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text between [CLS] and [SEP], each literal `[MASK]` one mask id, the rest as pretraining saw it.

    A masked word took its space along, so spaces before a mask vanish; what follows a mask begins a word only after a
    space ("the [MASK] ing" and "the [MASK]ing" differ), whereas SentencePiece would begin a word with every part.
    """
    ids = []
    for number, part in enumerate(text.split(MASK_PIECE)):
        ids += [tokenizer.mask_id] if number else []
        ids += tokenizer.encoder.ids(part.rstrip(), follows_mask=number > 0)
    return [tokenizer.cls_id, *ids, tokenizer.sep_id]
