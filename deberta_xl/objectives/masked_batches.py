"""From rows of the dataset to tensors on the device, step by step.

Shape suffixes of this file:
    B batch   S sequence
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.config import TrainSection
from deberta_xl.data.loader import Batch, PretrainingData, rank_samples
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.parallel.grid import Grid


class MicroBatch(NamedTuple):
    """What one forward takes."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    labelled: LabelledPositions

    @property
    def num_labels(self) -> int:
        """Labelled positions, known on the host."""
        return len(self.labelled.label_L)

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`, without waiting for it where the source is pinned."""
        labelled = LabelledPositions(*(t.to(device, non_blocking=True) for t in self.labelled))
        ids_BS, segments_BS = (t.to(device, non_blocking=True) for t in self[:2])
        return MicroBatch(ids_BS, segments_BS, labelled)


def build_micro_batch(batch: Batch, *, pin: bool) -> MicroBatch:
    """Host tensors of a batch. Labelled positions are found here, which spares the device a synchronisation."""
    ids_BS, segments_BS, labels_BS = map(torch.from_numpy, batch)
    labelled = LabelledPositions.of(labels_BS)
    if pin:
        ids_BS, segments_BS = ids_BS.pin_memory(), segments_BS.pin_memory()
        labelled = LabelledPositions(*(t.pin_memory() for t in labelled))
    return MicroBatch(ids_BS, segments_BS, labelled)


def step_batches(
    data: PretrainingData, train: TrainSection, first_sample: int, *, rank: int, size: int, pin: bool
) -> Iterator[list[MicroBatch]]:
    """For every step from `first_sample` on: this data-parallel rank's micro-batches. Endless."""
    while True:
        starts = rank_samples(first_sample, train.global_batch_size, train.micro_batch_size, rank, size)
        yield [build_micro_batch(data.batch(start, train.micro_batch_size), pin=pin) for start in starts]
        first_sample += train.global_batch_size


def micro_batch_keys(seed: int, step: int, count: int, grid: Grid) -> list[DropoutKey]:
    """Dropout keys of this rank's `count` micro-batches of a step.

    A key names the micro-batch's place in the global batch (`rank_samples`), so a run of equal micro-batches has the
    same masks on any number of data-parallel ranks.
    """
    key = DropoutKey(seed).fold("step", step)
    size, rank = grid.data_parallel_size, grid.data_parallel_rank
    return [key.fold("micro-batch", number * size + rank) for number in range(count)]
