"""Text that goes on where a prompt ends, token by token.

    model = DebertaForMaskedLM.from_pretrained("runs/story")
    tokenizer = tokenizer_for(Path("runs/story"), None)
    for written in generate(model, tokenizer, ["Once upon a time"], Writing(max_new_tokens=40)):
        print(written.text)

A token is predicted from the decoded state of the one before it, as such models are trained; of a prompt's tokens a
prefix model sees all from everywhere. The text ends where the model writes [SEP]. No other special token is ever
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import at_least, frozen
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.cached_model import CachedModel
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.prompts import GenerationError, Prompt, Speller, read_prompt
from deberta_xl.public.room import Limit, Room
from deberta_xl.public.sampling import Sampling, choose_tokens

Stop = Literal["end", "max_new_tokens"] | Limit
Hear = Callable[[int, int], None]
"""Is told each new token: the row of its prompt in the batch, and its id."""


@frozen
class Writing:
    """How texts are written."""

    max_new_tokens: int = 64
    """Tokens after which a text stops that has not ended by itself."""
    max_length: int | None = None
    """Tokens of prompt and continuation together, [CLS] included, at most; when unset, as many as a row of the model's
    training had, where that is recorded. It may be any number up to that of the model's positions."""
    sampling: Sampling | None = None
    """How tokens are drawn; without, each is the most probable one."""
    batch_size: int = 8
    """Prompts that are continued together."""

    def __post_init__(self) -> None:
        at_least(1, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        at_least(3, max_length=self.max_length)  # [CLS], a prompt and what follows it


GREEDY = Writing()
"""Each token the most probable one."""


class Ranks(NamedTuple):
    """This rank among those that write together, each some of the batches."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Those; None for all."""
    join_logits: Callable[[Tensor], Tensor] = lambda logits_BV: logits_BV
    """Where the model is divided over further ranks: from this rank's columns to the whole vocabulary."""


ALONE = Ranks()


class Written(NamedTuple):
    """A prompt and how it goes on."""

    prompt: str
    continuation: str
    """What follows the prompt, with the space before it where a new word begins."""
    token_ids: list[int]
    """Of the continuation, without [SEP]."""
    stopped: Stop
    """Why it stops: the model has ended the text, or there is no room for more."""

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation


def generate(
    model: DebertaForMaskedLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    writing: Writing = GREEDY,
    *,
    ranks: Ranks = ALONE,
    hear: Hear = lambda row, token_id: None,
) -> Iterator[Written]:
    """The continuation of each prompt, in order, batch by batch. `model` is in evaluation mode.

    Collective: the batches go round the `ranks`, and all of these get all of them. `hear` is told each token as it
    comes, of this rank's batches.

    Raises GenerationError for a prompt that cannot be continued, a tokenizer larger than the model's vocabulary, or
    outputs that are not finite numbers; ConfigError for an impossible top_k or max_length.
    """
    check_model(model, tokenizer, writing)
    room = Room.of(model.config, model.learnt, writing.max_length)
    read = [read_prompt(text, number, tokenizer, room) for number, text in enumerate(prompts)]
    batches = [read[first : first + writing.batch_size] for first in range(0, len(read), writing.batch_size)]
    for first in range(0, len(batches), ranks.size):
        found: list[Written] | GenerationError = []
        try:
            for batch in batches[first : first + ranks.size][ranks.rank : ranks.rank + 1]:
                found = write_batch(model, tokenizer, batch, writing, hear, ranks.join_logits)
        except GenerationError as error:
            found = error  # for all ranks: they would wait for this one
        yield from from_all_ranks(found, ranks)


def from_all_ranks(found: list[Written] | GenerationError, ranks: Ranks) -> Iterator[Written]:
    """What each rank has found, in their order. Collective. Raises the first error that there is on any."""
    parts: list[Any] = [found]
    if ranks.size > 1:
        parts = [None] * ranks.size
        dist.all_gather_object(parts, found, group=ranks.group)
    for part in parts:
        if isinstance(part, GenerationError):
            raise part
        yield from part


def check_model(model: DebertaForMaskedLM, tokenizer: Tokenizer, writing: Writing) -> None:
    """Refuse a tokenizer that is not the model's, and a top_k that it cannot fill."""
    if tokenizer.mask_id >= model.config.vocab_size:
        raise GenerationError(
            f"the tokenizer has {tokenizer.mask_id + 1} ids, the model only {model.config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    num_allowed = int(allowed_tokens(tokenizer, model.config.vocab_size).sum())
    top_k = writing.sampling.top_k if writing.sampling else None
    if top_k is not None and top_k > num_allowed:
        raise ConfigError(f"top_k={top_k} is more than there is to draw from: the tokenizer's {num_allowed:,} tokens")


def allowed_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Ids that may be written, bool [vocab_size]: the ordinary ones, and [SEP], which ends the text."""
    allowed = np.zeros(vocab_size, bool)
    known = min(vocab_size, tokenizer.vocab_size)
    allowed[:known] = ~tokenizer.special[:known]
    allowed[tokenizer.sep_id] = True
    return allowed


class Text:
    """A prompt's text while it grows."""

    def __init__(self, prompt: Prompt, max_new_tokens: int, room: Room):
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.stopped: Stop | None = None
        wanted = len(prompt.token_ids) + max_new_tokens
        self.limit = min(wanted, room.length)
        """Tokens at most."""
        self.reason: Stop = "max_new_tokens" if wanted <= room.length else room.limit
        """Why there cannot be more."""

    @property
    def length(self) -> int:
        """Tokens so far, which is the position of the next one."""
        return len(self.prompt.token_ids) + len(self.token_ids)

    def take(self, token_id: int, end_id: int) -> bool:
        """Add a token, or end; whether the token belongs to the text."""
        if token_id == end_id:
            self.stopped = "end"
            return False
        self.token_ids.append(token_id)
        if self.length == self.limit:
            self.stopped = self.reason
        return True


@torch.no_grad()
def write_batch(
    model: DebertaForMaskedLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    writing: Writing,
    hear: Hear,
    join_logits: Callable[[Tensor], Tensor],
) -> list[Written]:
    """The continuations of prompts that are read together, each as long as it takes."""
    device = model.head.bias.device
    room = Room.of(model.config, model.learnt, writing.max_length)
    texts = [Text(prompt, writing.max_new_tokens, room) for prompt in prompts]
    length_B = torch.tensor([text.length for text in texts], device=device)
    slot_T = torch.arange(max(text.limit for text in texts), device=device)
    cached = CachedModel(model, (slot_T < length_B.unsqueeze(1)) & (model.learnt.writes_as == "prefix"))
    forbidden_V = torch.from_numpy(~allowed_tokens(tokenizer, model.config.vocab_size)).to(device)
    padded = np.zeros((len(texts), int(length_B.max())), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt.token_ids)] = prompt.token_ids
    logits_BV = join_logits(cached.read(torch.from_numpy(padded).to(device), length_B))
    going = list(range(len(texts)))
    while True:
        here = [texts[row] for row in going]
        token_B = choose_tokens(
            logits_BV.masked_fill(forbidden_V, float("-inf")),
            writing.sampling,
            [text.prompt.number for text in here],
            [text.length for text in here],
        )
        for row, token in zip(going, fetch(token_B, logits_BV), strict=True):
            if texts[row].take(token, tokenizer.sep_id):
                hear(row, token)
        still = [place for place, row in enumerate(going) if texts[row].stopped is None]
        if not still:
            return [finish(text, tokenizer) for text in texts]
        if len(still) < len(going):
            place_K = torch.tensor(still, device=device)
            cached.keep(place_K)
            going, token_B = [going[place] for place in still], token_B.index_select(0, place_K)
        logits_BV = join_logits(cached.read(token_B.unsqueeze(1), torch.ones_like(token_B)))


def fetch(token_B: Tensor, logits_BV: Tensor) -> list[int]:
    """The tokens on the host: here a step waits for the device.

    Raises GenerationError for logits that are no numbers.
    """
    tokens = torch.where(logits_BV.isfinite().all(-1), token_B, -1).tolist()
    if -1 in tokens:
        raise GenerationError(
            "the model's outputs are not finite numbers: its training has diverged or its weights are damaged; take an "
            "earlier checkpoint"
        )
    return tokens


def finish(text: Text, tokenizer: Tokenizer) -> Written:
    """What has been written."""
    speller = Speller(tokenizer)
    continuation = "".join([*map(speller.spell, text.token_ids), speller.end()])
    return Written(text.prompt.text, continuation, text.token_ids, text.stopped)
