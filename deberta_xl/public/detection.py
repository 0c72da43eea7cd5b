"""Finding replaced tokens: what the discriminator of replaced token detection says of each token of a text.

Shape suffixes of this file:
    B batch   S tokens of the longest text, with [CLS] and [SEP]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from deberta_xl.base.errors import UserError
from deberta_xl.checkpoint.lazy import read_all
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.replaced_tokens import Discriminator
from deberta_xl.public.room import warn_of_length
from deberta_xl.public.text_batches import each_text, text_batches
from deberta_xl.weights.initial_weights import open_pretrained
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.names import DETECTOR
from deberta_xl.weights.native import fill_model
from deberta_xl.weights.native_config import UNRECORDED, Learnt

CHUNK = 1024
"""Texts whose results are held at once."""


class DetectionError(UserError):
    """A text, or a tokenizer, with which nothing can be found."""


class DebertaForDetection(Discriminator):
    """DeBERTa with the head that tells which tokens of a text were replaced. See `Discriminator.forward`."""

    learnt: Learnt = UNRECORDED
    """On how long rows it was trained, as its folder says."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """The discriminator in a folder, in evaluation mode; folders are those of `DebertaForMaskedLM`.

        Raises CheckpointError when files are missing or damaged, or there is no such head.
        """
        source = find_pretrained(directory)
        model = open_pretrained(source, may_be_fresh=True)
        if DETECTOR not in model.tensors:
            raise CheckpointError(
                f"{source} has no head that finds replaced tokens: only a discriminator has, which "
                "train.objective=replaced_tokens makes, and the releases of v3. A model with a masked-LM head fills "
                f'masks: python tools/fill_mask.py {source} "TEXT with [MASK]"'
            )
        with torch.device("meta"):
            discriminator = cls(model.config)
        names = {name for name, _ in discriminator.named_parameters()}
        weights = read_all({name: tensor for name, tensor in model.tensors.items() if name in names})
        fill_model(discriminator, weights, source, dtype)
        discriminator.learnt = model.learnt
        return discriminator.eval()


class JudgedToken(NamedTuple):
    """What is said of one token."""

    piece: str
    """SentencePiece's piece; U+2581 at its beginning stands for the space before a word."""
    start: int
    """Its first character in the text."""
    end: int
    """The character behind its last one; `start` for a token that stands for no character."""
    probability: float
    """Of having been replaced."""


class Found(NamedTuple):
    """A stretch of the text, one token or neighbouring ones, that was probably replaced."""

    start: int
    end: int
    probability: float
    """Of the most probable of its tokens."""


def detect(model: DebertaForDetection, tokenizer: Tokenizer, text: str) -> list[JudgedToken]:
    """`detect_all` of one text."""
    return next(detect_all(model, tokenizer, [text]))


def detect_all(model: DebertaForDetection, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[JudgedToken]]:
    """What the discriminator says of each token of each text, in order; of texts longer than in its training with a
    warning. All texts are read before the first is judged.

    Raises DetectionError for a text that is empty or longer than the model takes, and a tokenizer larger than its
    vocabulary.
    """
    read_texts = each_text(texts, partial(read, model, tokenizer), DetectionError)
    ids_of = [[tokenizer.cls_id, *ids, tokenizer.sep_id] for ids, _ in read_texts]
    warn_of_length(model.learnt, max(map(len, ids_of), default=0))
    for start in range(0, len(texts), CHUNK):
        chunk = slice(start, start + CHUNK)
        does = f"judging texts {start + 1:,} … {min(chunk.stop, len(texts)):,} of {len(texts):,}"
        for probabilities, (ids, places) in zip(judge(model, ids_of[chunk], does), read_texts[chunk], strict=True):
            tokens = zip(ids, places.tolist(), probabilities, strict=True)
            yield [JudgedToken(tokenizer.id_to_piece(token), *place, value) for token, place, value in tokens]


def judge(model: DebertaForDetection, ids_of: Sequence[list[int]], does: str) -> list[list[float]]:
    """The probabilities of the tokens between [CLS] and [SEP] of each text."""
    found: list[list[float]] = [[] for _ in ids_of]
    device = model.detector.classifier.bias.device
    for numbers, input_ids_BS, segments_BS in text_batches(ids_of, device, does):
        with torch.no_grad():
            probability_BS = model(input_ids_BS, segments_BS).sigmoid()
        if not bool(probability_BS.isfinite().all()):
            raise DetectionError(
                "the model's outputs are not finite numbers: its training has diverged or its weights are damaged; "
                "take an earlier checkpoint"
            )
        for number, probability_S in zip(numbers, probability_BS, strict=True):
            found[number] = probability_S[1 : len(ids_of[number]) - 1].tolist()
    return found


def read(model: DebertaForDetection, tokenizer: Tokenizer, text: str) -> tuple[list[int], np.ndarray]:
    """The ids of a text's tokens and their places in it, after refusing what cannot be judged."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DetectionError("the text is not UTF-8; type it, or convert it, in UTF-8")
    ids, places = tokenizer.encode_with_places(text)
    if not ids:
        raise DetectionError("the text is empty; write one with words in it")
    if tokenizer.mask_id >= model.config.vocab_size:
        raise DetectionError(
            f"the tokenizer has {tokenizer.mask_id + 1} ids, the model only {model.config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    longest = model.config.max_position_embeddings
    if len(ids) + 2 > longest:
        raise DetectionError(f"the text has {len(ids) + 2} tokens, the model takes {longest}; shorten the text")
    return ids, places


def stretches(judged: Sequence[JudgedToken], threshold: float) -> list[Found]:
    """The stretches of a text whose tokens were replaced with at least this probability."""
    found: list[Found] = []
    for token in judged:
        if token.probability < threshold or token.start == token.end:
            continue
        if found and token.start <= found[-1].end:
            last = found.pop()
            token = token._replace(start=last.start, probability=max(last.probability, token.probability))
        found.append(Found(token.start, token.end, token.probability))
    return found
