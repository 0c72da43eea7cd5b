"""Many texts through a model: in batches with little padding, each text as if it were alone, memory that is bounded.

Shape suffixes of this file:
    B batch   S sequence
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deberta_xl.base.errors import UserError
from deberta_xl.base.progress import tracked
from deberta_xl.settings.architecture import PAD_ID
from deberta_xl.tasks.length_batches import MICRO_BATCH_TOKENS, length_batches

Read = TypeVar("Read")


class TooLittleMemory(UserError):
    """A forward pass did not fit."""


class TextBatch(NamedTuple):
    """Some of the texts, of similar length."""

    numbers: list[int]
    """Among all texts."""
    input_ids_BS: Tensor
    segments_BS: Tensor
    """1, and 0 at padding."""


def each_text(texts: Sequence[str], read: Callable[[str], Read], error_class: type[UserError]) -> list[Read]:
    """What `read` makes of each text; of several, an error says which one it is about."""
    found = []
    for number, text in enumerate(texts, start=1):
        try:
            found.append(read(text))
        except error_class as error:
            raise error_class(f"text {number} of {len(texts)}: {error}" if len(texts) > 1 else str(error)) from None
    return found


def text_batches(texts: Sequence[Sequence[int]], device: torch.device, does: str) -> Iterator[TextBatch]:
    """Every text, given as its token ids, in one of the batches, with progress in what they are read for."""
    lengths = np.array([len(ids) for ids in texts])
    chosen = length_batches(lengths, MICRO_BATCH_TOKENS)
    for numbers in tracked(chosen, does, len(chosen), "batches"):
        length_B1 = torch.from_numpy(lengths[numbers]).unsqueeze(1)
        is_text_BS = torch.arange(int(length_B1.max())) < length_B1
        input_ids_BS = torch.full(is_text_BS.shape, PAD_ID)
        input_ids_BS[is_text_BS] = torch.tensor([token for number in numbers for token in texts[number]])
        yield TextBatch(numbers.tolist(), input_ids_BS.to(device), is_text_BS.long().to(device))


@contextlib.contextmanager
def memory_advice(micro_batch_tokens: int) -> Iterator[None]:
    """What is computed in batches of so many tokens. Raises TooLittleMemory, with the way out, where that fails."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise TooLittleMemory(
            f"the memory does not suffice for {micro_batch_tokens:,} tokens in one forward; give a smaller "
            "--micro_batch_tokens (one text or row is the least), or --dtype bfloat16"
        ) from error
