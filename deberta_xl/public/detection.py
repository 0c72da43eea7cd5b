"""Finding replaced tokens: what the discriminator of replaced token detection says of each token of a text.

Shape suffixes of this file:
    S tokens of the text, with [CLS] and [SEP]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch

from deberta_xl.base.errors import UserError
from deberta_xl.checkpoint.lazy import read_all
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.replaced_tokens import Discriminator
from deberta_xl.public.room import warn_of_length
from deberta_xl.weights.initial_weights import open_pretrained
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.names import DETECTOR
from deberta_xl.weights.native import fill_model
from deberta_xl.weights.native_config import UNRECORDED, Learnt


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
    """What the discriminator says of each token of a text, in order; of one longer than in its training with a warning.

    Raises DetectionError for a text that is empty or longer than the model takes, and a tokenizer larger than its
    vocabulary.
    """
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
    warn_of_length(model.learnt, len(ids) + 2)
    device = model.detector.classifier.bias.device
    input_ids_1S = torch.tensor([[tokenizer.cls_id, *ids, tokenizer.sep_id]], device=device)
    with torch.no_grad():
        probability_S = model(input_ids_1S)[0].sigmoid()
    if not bool(probability_S.isfinite().all()):
        raise DetectionError(
            "the model's outputs are not finite numbers: its training has diverged or its weights are damaged; take an "
            "earlier checkpoint"
        )
    judged = zip(ids, places.tolist(), probability_S[1:-1].tolist(), strict=True)
    return [JudgedToken(tokenizer.id_to_piece(number), *place, value) for number, place, value in judged]


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
