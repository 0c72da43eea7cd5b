"""Masked-LM loss, accuracy and perplexity on held-out rows, over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.data.loader import PretrainingData
from deberta_xl.model.masked_lm import MaskedLMOutput
from deberta_xl.training.batches import MicroBatch, build_micro_batch


class Evaluation(NamedTuple):
    """Means over all labelled tokens of the held-out rows."""

    loss: float
    """Cross-entropy in nats."""
    accuracy: float
    """Share of labelled tokens guessed right."""
    num_labels: int
    """Labelled tokens."""
    unigram_entropy: float
    """Entropy of the labelled tokens' own distribution, nats: the loss of the best guess that reads no context."""
    label_L: Tensor
    """This rank's labels, on the host."""
    guess_L: Tensor
    """This rank's best guesses."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluation_batches(
    data: PretrainingData, *, max_samples: int, micro_batch_size: int, rank: int, size: int
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the first `max_samples` rows (0: of all).

    All ranks get equally many, since parameters partitioned over ranks need every rank in every forward: ranks that
    have run out get batches of padding, without labels.
    """
    num_rows = min(data.num_rows, max_samples or data.num_rows)
    starts = range(0, num_rows, micro_batch_size)
    for turn in range(rank, len(starts) + (-len(starts)) % size, size):
        start = turn * micro_batch_size
        count = min(micro_batch_size, num_rows - start) if start < num_rows else 0
        batch = data.fixed_batch(start, count) if count else data.fixed_batch(data.num_rows, micro_batch_size)
        yield build_micro_batch(batch, pin=False)


@torch.no_grad()
def evaluate(
    model: Callable[..., MaskedLMOutput],
    data: PretrainingData,
    *,
    vocab_size: int,
    device: torch.device,
    max_samples: int,
    micro_batch_size: int,
    rank: int = 0,
    size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Evaluate `model` (a module or an engine, in evaluation mode) on rows in their order, under fixed masks.

    Collective over the `size` ranks of `group` (all ranks by default) when there are several.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    label_counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
    labels, guesses = [], []
    options = {"max_samples": max_samples, "micro_batch_size": micro_batch_size, "rank": rank, "size": size}
    for host_batch in evaluation_batches(data, **options):
        batch = host_batch.to(device)
        output = model(batch.input_ids_BS, batch.segments_BS, labels=batch.labelled, label_count=1.0)
        num_correct = (output.guess_L == batch.labelled.label_L).sum()
        sums += torch.stack([output.loss.double(), num_correct.double()])
        label_counts += torch.bincount(batch.labelled.label_L, minlength=vocab_size)
        labels.append(batch.labelled.label_L.cpu())
        guesses.append(output.guess_L.cpu())
    if size > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(label_counts, group=group)
    num_labels = int(label_counts.sum())
    loss, accuracy = (sums / num_labels).tolist()  # not numbers where nothing was masked
    return Evaluation(loss, accuracy, num_labels, entropy(label_counts), torch.cat(labels), torch.cat(guesses))


def entropy(counts: Tensor) -> float:
    """Entropy in nats of the distribution given by counts; 0 without any."""
    shares = counts[counts > 0].double() / max(1, int(counts.sum()))
    return float(-(shares * shares.log()).sum())
