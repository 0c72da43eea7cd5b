"""Masked-LM loss, accuracy and perplexity on held-out rows, over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.progress import tracked
from deberta_xl.data.unigram import cross_entropy
from deberta_xl.model.masked_lm import MaskedLMOutput
from deberta_xl.objectives.masked_batches import MicroBatch, build_micro_batch


class Evaluation(NamedTuple):
    """Means over all labelled tokens of the held-out rows."""

    loss: float
    """Cross-entropy in nats."""
    accuracy: float
    """Share of labelled tokens guessed right."""
    num_labels: int
    """Labelled tokens."""
    unigram_entropy: float | None
    """Cross-entropy of the labels under the training set's unigram, nats: the loss of a guess that reads no context."""
    label_L: Tensor
    """This rank's labels, on the host."""
    guess_L: Tensor
    """This rank's best guesses."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


class Prediction(NamedTuple):
    """What a model says of one micro-batch, on the device."""

    label_L: Tensor
    """What was to be predicted."""
    loss_sum: Tensor
    """Cross-entropy summed over the labelled positions."""
    guess_L: Tensor
    """The best guess at each."""


Predict = Callable[[Iterable[MicroBatch]], Iterator[Prediction]]


def predict_with(model: Callable[..., MaskedLMOutput], device: torch.device) -> Predict:
    """Prediction by `model` (a module or an engine, in evaluation mode), batch by batch."""

    def predict(batches: Iterable[MicroBatch]) -> Iterator[Prediction]:
        for host_batch in batches:
            batch = host_batch.to(device)
            output = model(batch.input_ids_BS, batch.segments_BS, labels=batch.labelled, label_count=1.0)
            yield Prediction(batch.labelled.label_L, output.loss, output.guess_L)

    return predict


def evaluation_batches(
    data: PretrainingData, *, max_samples: int, micro_batch_size: int, rank: int, size: int
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the first `max_samples` rows (0: of all) in the order of evaluation.

    All ranks get equally many, since parameters partitioned over ranks need every rank in every forward: ranks that
    have run out get batches of padding, without labels. All batches have one shape, as a pipeline needs them.
    """
    num_rows = min(data.num_rows, max_samples or data.num_rows)
    for turn in range(rank, size * batches_per_rank(num_rows, micro_batch_size, size), size):
        start = turn * micro_batch_size
        yield build_micro_batch(data.held_out_batch(start, micro_batch_size, end=num_rows), pin=False)


def batches_per_rank(num_rows: int, micro_batch_size: int, size: int) -> int:
    """Micro-batches that each of `size` ranks gets of an evaluation."""
    return math.ceil(math.ceil(num_rows / micro_batch_size) / size)


@torch.no_grad()
def evaluate(
    predict: Predict,
    data: PretrainingData,
    *,
    vocab_size: int,
    device: torch.device,
    max_samples: int,
    micro_batch_size: int,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    log_unigram: np.ndarray | None = None,
    guard: Callable[[Iterator[MicroBatch]], Iterator[MicroBatch]] = iter,
) -> Evaluation:
    """Evaluate what `predict` says of rows in a fixed order, under fixed masks.

    `log_unigram` is `data/unigram.py`'s of the training set, where `unigram_entropy` is wanted. `guard` is what the
    batches go through on their way, and may end the evaluation. Collective over the `size` ranks of `group` (all ranks
    by default) when there are several.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    label_counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
    labels, guesses = [], []
    options = {"max_samples": max_samples, "micro_batch_size": micro_batch_size, "rank": rank, "size": size}
    predictions = predict(guard(evaluation_batches(data, **options)))
    num_batches = batches_per_rank(min(data.num_rows, max_samples or data.num_rows), micro_batch_size, size)
    for label_L, loss_sum, guess_L in tracked(predictions, "evaluating", num_batches, "batches"):
        sums += torch.stack([loss_sum.double(), (guess_L == label_L).sum().double()])
        label_counts += torch.bincount(label_L, minlength=vocab_size)
        labels.append(label_L.cpu())
        guesses.append(guess_L.cpu())
    if size > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(label_counts, group=group)
    num_labels = int(label_counts.sum())
    loss, accuracy = (sums / num_labels).tolist()  # not numbers where nothing was masked
    unigram = None if log_unigram is None else cross_entropy(label_counts.cpu().numpy(), log_unigram)
    return Evaluation(loss, accuracy, num_labels, unigram, torch.cat(labels), torch.cat(guesses))
