"""What a guess without context is worth: the cross-entropy of labels under the training set's unigram."""

from __future__ import annotations

import itertools

import numpy as np

from deberta_xl.base.log import logger
from deberta_xl.data.token_store import TokenStore

SAMPLED_BLOCKS, BLOCK_TOKENS = 64, 2**20
"""What is counted of a dataset whose manifest holds no counts: all of a small one, parts of a large one."""


def token_counts(store: TokenStore, vocab_size: int) -> np.ndarray:
    """How often each id stands in a dataset, int64 `[vocab_size]`; of Megatron's and older datasets, counted here."""
    counts = np.zeros(vocab_size, np.int64)
    if (noted := store.token_counts) is not None:
        counts[: len(noted)] = noted[:vocab_size]
        return counts
    num_counted = 0
    edges = [store.num_tokens * number // SAMPLED_BLOCKS for number in range(SAMPLED_BLOCKS + 1)]
    for start, end in itertools.pairwise(edges):
        stop = min(end, start + BLOCK_TOKENS)
        ids = store.read_stream(start, stop)
        # The loader refuses foreign ids when it meets them; here they only must not count.
        counts += np.bincount(ids[(ids >= 0) & (ids < vocab_size)], minlength=vocab_size)
        num_counted += stop - start
    if num_counted < store.num_tokens:
        logger.info(
            "%s: the manifest holds no counts; the unigram is that of %s tokens from all over it", store.prefix,
            f"{num_counted:,}",
        )  # fmt: skip
    return counts


def log_unigram(counts: np.ndarray, special: np.ndarray) -> np.ndarray:
    """ln of the probability of each id that can be a label, float64 `[vocab_size]`; −inf for `special` ones.

    Ids that the training set lacks share the probability that Good and Turing give to whatever is unseen: as much as
    the ids that were seen once have together, and at least one token's.
    """
    counts = np.where(special, 0, counts).astype(np.float64)
    is_unseen = ~special & (counts == 0)
    total, num_unseen = counts.sum(), np.count_nonzero(is_unseen)
    unseen = max(1.0, np.count_nonzero(counts == 1)) if num_unseen else 0.0
    # With nothing but singletons Good and Turing leave the seen ids nothing; half of it is theirs then.
    share = min(0.5, unseen / total) if total else 1.0
    probability = np.where(is_unseen, share / max(1, num_unseen), (1 - share) * counts / max(1.0, total))
    with np.errstate(divide="ignore"):
        return np.log(probability)


def cross_entropy(label_counts: np.ndarray, log_probability: np.ndarray) -> float:
    """Mean of −ln p over labels that are counted by id, nats; labels beyond the table have none to be compared with."""
    counts = label_counts[: len(log_probability)]
    is_label = counts > 0
    return float(-(counts[is_label] * log_probability[is_label]).sum() / counts.sum())
