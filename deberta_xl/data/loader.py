"""Batches as a pure function of sample numbers: the same numbers give the same batch on any rank, at any time.

All that a run must remember about its data is how many samples it has consumed.
"""

from __future__ import annotations

import copy
import functools
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from deberta_xl.base.errors import TokenStoreError
from deberta_xl.data.masking import Masker
from deberta_xl.data.packing import PackedRows
from deberta_xl.data.random_numbers import derive
from deberta_xl.data.sampler import sample_rows
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.unigram import log_unigram, token_counts
from deberta_xl.settings.pretraining import DataSection

Item = TypeVar("Item")


HELD_OUT_SEED = 0x48454C44
"""Seed of the order and the masks of held-out rows; no run's own, so that all runs are measured on the same thing."""
CHECKED_TOKENS, CHECKED_ROWS = 2**20, 64
"""Read at a time when a dataset is searched for something to predict; nearly always the first part has it."""
CHECKED_DOCUMENTS = 2**20
"""Measured at a time: the index of a large dataset is not read into memory as a whole."""


class Batch(NamedTuple):
    """What the model is given; all int64 `[batch, sequence]`, on the host."""

    input_ids: np.ndarray
    """Token ids, some of them masked."""
    segments: np.ndarray
    """0 = padding, n = n-th document of the row."""
    labels: np.ndarray
    """The id to predict; 0 = not predicted."""


class PretrainingData:
    """A dataset, packed into rows, shuffled and masked.

    Order and masks of training come from (seed, epoch, row), those of evaluation from the dataset alone. Raises
    TokenStoreError for a dataset of another tokenizer, and for an id outside the vocabulary.
    """

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, data_section: DataSection, sequence_length: int, seed: int
    ):
        store.check_tokenizer(tokenizer)
        self.store = store
        self.tokenizer = tokenizer
        self.seed = seed
        self.attend_across_documents = data_section.attend_across_documents
        self.packed_rows = self.packed(sequence_length)
        is_original = data_section.masking == "original"
        word_starts = tokenizer.original_word_starts if is_original else tokenizer.word_flags
        self.masker = Masker(
            data_section, word_starts=word_starts, special=tokenizer.special, mask_id=tokenizer.mask_id
        )

    def packed(self, sequence_length: int) -> PackedRows:
        """The documents in rows of so many tokens."""
        cls_id, sep_id, pad_id = self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.pad_id
        return PackedRows(self.store, sequence_length, cls_id=cls_id, sep_id=sep_id, pad_id=pad_id)

    def in_rows_of(self, sequence_length: int) -> PretrainingData:
        """The same dataset in rows of another length, each length in an order of its own."""
        if sequence_length == self.packed_rows.sequence_length:
            return self
        other = copy.copy(self)
        other.packed_rows = self.packed(sequence_length)
        return other

    def share_in_longer_documents(self, length: int) -> float:
        """Which share of the tokens stands in documents that do not fit a row of `length` tokens."""
        offsets, end = self.store.document_offsets, self.store.stream.size
        longer, limit = 0, (length - 2) * self.store.header.dtype.itemsize
        for start in range(0, len(offsets), CHECKED_DOCUMENTS):
            behind = offsets[start + CHECKED_DOCUMENTS : start + CHECKED_DOCUMENTS + 1]
            sizes = np.diff(offsets[start : start + CHECKED_DOCUMENTS], append=behind[0] if len(behind) else end)
            longer += int(sizes[sizes > limit].sum())
        return longer / end

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.packed_rows)

    @property
    def tokens(self) -> int:
        """Tokens of the dataset, specials not counted."""
        return self.store.num_tokens

    @functools.cached_property
    def log_unigram(self) -> np.ndarray:
        """ln of each id's share of the dataset, float64 `[vocab_size]` (`data/unigram.py`); counted at first use."""
        return log_unigram(token_counts(self.store, self.tokenizer.vocab_size), self.tokenizer.special)

    @property
    def fingerprint(self) -> str:
        """Changes when the dataset's content changes."""
        return self.store.fingerprint

    def check_training(self) -> None:
        """Raise TokenStoreError when no row can ever have a token to predict."""
        says_something = self.tokenizer.says_something
        for start in range(0, self.store.num_tokens, CHECKED_TOKENS):
            ids = self.store.read_stream(start, min(start + CHECKED_TOKENS, self.store.num_tokens))
            # Ids outside the vocabulary are refused where they are met.
            if np.any(says_something[np.clip(ids, 0, self.tokenizer.vocab_size - 1)]):
                return
        raise TokenStoreError(
            f"dataset {self.store.prefix} holds nothing to learn from: all of its {self.store.num_tokens:,} tokens are "
            "[UNK], spaces or special ones; make it anew with a tokenizer that knows its characters"
        )

    def check_held_out(self, max_samples: int) -> None:
        """Raise TokenStoreError when none of `max_samples` rows (0: of all) has a token to predict in evaluation.

        Rows of less than 1 / mask_probability tokens have one by chance only.
        """
        num_rows = min(self.num_rows, max_samples or self.num_rows)
        if any(
            self.held_out_batch(place, CHECKED_ROWS, end=num_rows).labels.any()
            for place in range(0, num_rows, CHECKED_ROWS)
        ):
            return
        raise TokenStoreError(
            f"dataset {self.store.prefix} cannot be evaluated: no token of its {num_rows:,} rows "
            f"({self.store.num_tokens:,} tokens in all) was chosen for prediction. Give more text "
            f"({1 / self.masker.rule.mask_probability:.0f} tokens and more that are not [UNK] suffice)"
        )

    def batch(self, first_sample: int, count: int) -> Batch:
        """The global samples first_sample … first_sample + count − 1 of the run, shuffled anew in each epoch."""
        return self.shuffled(self.seed, first_sample, count)

    def held_out_batch(self, first: int, count: int, end: int | None = None) -> Batch:
        """The places first … first + count − 1 of a fixed order of the rows, always masked alike: for evaluation.

        The order is a permutation, so that its first rows come from all over the dataset, whatever it was joined from.
        Places from `end` (the number of rows) on are all padding, so that every rank can be given equally many batches
        of one shape.
        """
        present = min(count, (self.num_rows if end is None else end) - first)
        if present <= 0:
            return Batch(*np.zeros((3, count, self.packed_rows.sequence_length), np.int64))
        batch = self.shuffled(HELD_OUT_SEED, first, present)
        return Batch(*(np.pad(part, ((0, count - present), (0, 0))) for part in batch))

    def keys(self, seed: int, first_sample: int, count: int) -> np.ndarray:
        """What names the random draws of those samples in the order that `seed` gives, uint64 `[count]`."""
        return derive(seed, *sample_rows(seed, self.num_rows, first_sample, count))

    def shuffled(self, seed: int, first_sample: int, count: int) -> Batch:
        """The samples first_sample … first_sample + count − 1 of the order that `seed` gives, masked."""
        epochs, rows = sample_rows(seed, self.num_rows, first_sample, count)
        input_ids, segments = self.packed_rows.rows(rows)
        outside = (input_ids < 0) | (input_ids >= self.tokenizer.vocab_size)
        if np.any(outside):
            raise TokenStoreError(
                f"dataset {self.store.prefix} holds token id {input_ids[outside][0]}, outside the tokenizer's "
                f"0 … {self.tokenizer.vocab_size - 1}; it is damaged or was made with another tokenizer"
            )
        masked, labels = self.masker.mask(input_ids, segments, derive(seed, epochs, rows))
        if self.attend_across_documents:
            segments = np.minimum(segments, 1)
        return Batch(masked, segments, labels)


def rank_samples(
    step_first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> range:
    """First sample of each micro-batch of one rank within a step.

    Micro-step m of rank r covers the samples first + (m·ranks + r)·micro_batch_size …, so a step's samples are the same
    for every number of ranks.
    """
    per_pass = micro_batch_size * data_parallel_size
    assert global_batch_size % per_pass == 0, "TrainSection.gradient_accumulation_steps refuses this"
    first = step_first_sample + data_parallel_rank * micro_batch_size
    return range(first, step_first_sample + global_batch_size, per_pass)


class Failure(NamedTuple):
    """Carries an exception from the prefetching thread to the consumer."""

    error: BaseException


END = object()


def prefetch(iterable: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items of `iterable`, up to `depth` of them computed ahead in a thread.

    An exception of the iterable is raised where its item would have come. Closing the generator (or dropping it) ends
    the thread after the item it is at.
    """
    items: queue.Queue = queue.Queue(maxsize=max(1, depth))
    is_abandoned = threading.Event()
    thread = threading.Thread(target=produce, args=(iterable, items, is_abandoned), name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not END:
            if isinstance(item, Failure):
                raise item.error
            yield item
    finally:
        is_abandoned.set()
        with items.mutex:
            items.queue.clear()
            items.not_full.notify_all()
        thread.join()


def produce(iterable: Iterable[Item], items: queue.Queue, is_abandoned: threading.Event) -> None:
    """Fill the queue until the iterable ends, fails, or nobody listens any more."""
    try:
        for item in iterable:
            items.put(item)
            if is_abandoned.is_set():
                return
        items.put(END)
    except BaseException as error:
        items.put(Failure(error))
