"""From rows of the dataset to tensors, step by step.

Shape suffixes of this file:
    B batch   S sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deberta_xl.data.loader import HELD_OUT_SEED, Batch, PretrainingData, rank_samples
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.objectives.micro_batch import is_named
from deberta_xl.settings.pretraining import TrainSection

Built = TypeVar("Built")


class MaskedRows(NamedTuple):
    """Packed rows in which something is to be predicted: masked tokens, or what is hidden by what is not open."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    """0 = padding, n = n-th document of the row: what a model takes as its attention mask."""
    labelled: LabelledPositions
    open_BS: Tensor | None = None
    """Tokens seen from everywhere in their document, bool; None for all of them."""
    more_counts: tuple[int, ...] = ()
    """What its objective counts besides."""

    @classmethod
    def of(cls, batch: Batch) -> MaskedRows:
        """From arrays. Labelled positions are found on the host, which spares the device a synchronisation."""
        ids_BS, segments_BS, labels_BS = map(torch.from_numpy, batch)
        return cls(ids_BS, segments_BS, LabelledPositions.of(labels_BS))

    @property
    def counts(self) -> tuple[int, ...]:
        """Labelled positions, and more."""
        return (self.labelled.num_labels, *self.more_counts)


class Rows(NamedTuple):
    """Packed rows as they stand in the dataset, without masks."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    """0 = padding, n = n-th document of the row: what a model takes as its attention mask."""
    counts: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch) -> Rows:
        """From arrays, the masks taken off; counted are the tokens that are no padding."""
        ids_BS, segments_BS, labels_BS = map(torch.from_numpy, batch)
        return cls(torch.where(labels_BS > 0, labels_BS, ids_BS), segments_BS, (int((segments_BS > 0).sum()),))


class KeyedBatch(NamedTuple):
    """Rows, and what names the random draws of each at this visit."""

    rows: Batch
    key_B: np.ndarray
    """uint64, for `data/random_numbers.py`."""


class KeyedData(NamedTuple):
    """A dataset whose batches come with their keys, for an objective that draws something of its own."""

    data: PretrainingData

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.data.num_rows

    def batch(self, first_sample: int, count: int) -> KeyedBatch:
        """As `PretrainingData.batch`."""
        return KeyedBatch(self.data.batch(first_sample, count), self.data.keys(self.data.seed, first_sample, count))

    def held_out_batch(self, first: int, count: int, end: int | None = None) -> KeyedBatch:
        """As `PretrainingData.held_out_batch`."""
        return KeyedBatch(self.data.held_out_batch(first, count, end), self.data.keys(HELD_OUT_SEED, first, count))


def in_steady_sizes(batch: Built) -> Built:
    """The same micro-batch, with what is labelled of its `MaskedRows`, or of those inside it, filled up."""
    if isinstance(batch, MaskedRows):
        return batch._replace(labelled=batch.labelled.padded(batch.input_ids_BS.shape[1]))
    return type(batch)(*map(in_steady_sizes, batch)) if is_named(batch) else batch


def step_batches(
    data: PretrainingData | KeyedData,
    train: TrainSection,
    first_sample: int,
    build: Callable[[Batch | KeyedBatch], Built],
    *,
    rank: int,
    size: int,
) -> Iterator[list[Built]]:
    """For every step from `first_sample` on: this data-parallel rank's micro-batches. Endless."""
    while True:
        starts = rank_samples(first_sample, train.global_batch_size, train.micro_batch_size, rank, size)
        yield [in_steady_sizes(build(data.batch(start, train.micro_batch_size))) for start in starts]
        first_sample += train.global_batch_size
