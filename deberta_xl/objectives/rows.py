"""From rows of the dataset to tensors, step by step.

Shape suffixes of this file:
    B batch   S sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from deberta_xl.data.loader import Batch, PretrainingData, rank_samples
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.settings.pretraining import TrainSection

Built = TypeVar("Built")


class MaskedRows(NamedTuple):
    """Packed rows, some of whose tokens are masked and to be predicted."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    """0 = padding, n = n-th document of the row: what a model takes as its attention mask."""
    labelled: LabelledPositions

    @classmethod
    def of(cls, batch: Batch) -> MaskedRows:
        """From arrays. Labelled positions are found on the host, which spares the device a synchronisation."""
        ids_BS, segments_BS, labels_BS = map(torch.from_numpy, batch)
        return cls(ids_BS, segments_BS, LabelledPositions.of(labels_BS))

    @property
    def counts(self) -> tuple[int]:
        """Labelled positions."""
        return (len(self.labelled.label_L),)


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


def step_batches(
    data: PretrainingData,
    train: TrainSection,
    first_sample: int,
    build: Callable[[Batch], Built],
    *,
    rank: int,
    size: int,
) -> Iterator[list[Built]]:
    """For every step from `first_sample` on: this data-parallel rank's micro-batches. Endless."""
    while True:
        starts = rank_samples(first_sample, train.global_batch_size, train.micro_batch_size, rank, size)
        yield [build(data.batch(start, train.micro_batch_size)) for start in starts]
        first_sample += train.global_batch_size
