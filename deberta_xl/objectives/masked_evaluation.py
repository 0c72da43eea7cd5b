"""Loss, accuracy and perplexity on held-out rows, over any number of ranks: of masked tokens, or of the next one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deberta_xl.data.loader import Batch, PretrainingData
from deberta_xl.data.unigram import cross_entropy
from deberta_xl.model.masked_lm import MaskedLMOutput
from deberta_xl.objectives.evaluation import Evaluator, Judged, Sums
from deberta_xl.objectives.micro_batch import on_device
from deberta_xl.objectives.rows import KeyedBatch, KeyedData, MaskedRows, in_steady_sizes

Built = TypeVar("Built")


class MaskedEvaluation(NamedTuple):
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
    """This rank's best guesses, on the host."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluation_batches(
    data: PretrainingData | KeyedData,
    build: Callable[[Batch | KeyedBatch], Built] = MaskedRows.of,
    *,
    max_samples: int,
    micro_batch_size: int,
    rank: int,
    size: int,
) -> Iterator[Built]:
    """This rank's micro-batches of the first `max_samples` rows (0: of all) in the order of evaluation.

    All ranks get equally many, since parameters partitioned over ranks need every rank in every forward: ranks that
    have run out get batches of padding, without labels. All batches have one shape, as a pipeline needs them.
    """
    num_rows = min(data.num_rows, max_samples or data.num_rows)
    for turn in range(rank, size * batches_per_rank(num_rows, micro_batch_size, size), size):
        yield in_steady_sizes(build(data.held_out_batch(turn * micro_batch_size, micro_batch_size, end=num_rows)))


def batches_per_rank(num_rows: int, micro_batch_size: int, size: int) -> int:
    """Micro-batches that each of `size` ranks gets of an evaluation."""
    return math.ceil(math.ceil(num_rows / micro_batch_size) / size)


def masked_sums(output: MaskedLMOutput, batch: MaskedRows) -> Sums:
    """Loss, divided as the model was asked to, and number of right guesses."""
    return {"loss": output.loss, "accuracy": batch.labelled.num_right(output.guess_L)}


def judged_by(run: Evaluator, batches: Iterable[MaskedRows]) -> Iterator[Judged]:
    """What the plain model says of each micro-batch."""
    for host_batch in batches:
        batch = on_device(host_batch, run.device)
        output = run.model(
            batch.input_ids_BS, batch.segments_BS, labels=batch.labelled, label_count=1.0, open_BS=batch.open_BS
        )
        yield Judged(host_batch, masked_sums(output, batch), output.guess_L)


@torch.no_grad()
def evaluate_masked_lm(
    run: Evaluator,
    data: PretrainingData | KeyedData,
    build: Callable[[Batch | KeyedBatch], MaskedRows] = MaskedRows.of,
    *,
    vocab_size: int,
    max_samples: int,
    micro_batch_size: int,
    log_unigram: np.ndarray | None = None,
    watch: Callable[[Iterable[MaskedRows]], Iterable[MaskedRows]] = iter,
) -> MaskedEvaluation:
    """Evaluate rows in a fixed order, under fixed masks, of which `build` makes what is predicted. Collective over the
    ranks of `run`.

    `log_unigram` is `data/unigram.py`'s of the training set, where `unigram_entropy` is wanted. `watch` sees the
    batches on their way.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    label_counts = np.zeros(vocab_size, np.int64)
    labels, guesses = [], []
    num_batches = batches_per_rank(min(data.num_rows, max_samples or data.num_rows), micro_batch_size, run.size)
    rows = {"max_samples": max_samples, "micro_batch_size": micro_batch_size, "rank": run.rank, "size": run.size}
    batches = watch(run.batches(evaluation_batches(data, build, **rows), does="evaluating", count=num_batches))
    for batch, found, guess_L in run.through_stages(batches) if run.through_stages else judged_by(run, batches):
        # The device is not waited for: labels are on the host, and guesses are fetched at the end.
        loss_sum += found["loss"].double()
        label_L = batch.labelled.without_padding().label_L
        label_counts += np.bincount(label_L.numpy(), minlength=vocab_size)
        labels.append(label_L)
        guesses.append(guess_L[: len(label_L)])
    label_L, guess_L = torch.cat(labels), torch.cat(guesses)
    num_right = (guess_L == label_L.to(run.device, non_blocking=True)).sum()
    guess_L = run.fetch(guess_L)
    sums, count_V = run.totals(torch.stack([loss_sum, num_right]), torch.from_numpy(label_counts))
    num_labels = int(count_V.sum())
    loss, accuracy = (sums / num_labels).tolist()  # not numbers where nothing was masked
    unigram = None if log_unigram is None else cross_entropy(count_V.numpy().astype(np.int64), log_unigram)
    return MaskedEvaluation(loss, accuracy, num_labels, unigram, label_L, guess_L)
