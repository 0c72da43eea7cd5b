"""The kernels and what each costs. Read without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

FLOAT32 = 4


class AttentionSizes(NamedTuple):
    """One call of a kernel on a rank."""

    rows: float
    """Sequences."""
    queries: float
    """Of each sequence."""
    keys: int
    """Of each sequence."""
    heads: float
    """On this rank."""
    head_size: int
    relative_rows: int
    """Rows of the relative table (2k)."""
    has_position_to_content: bool
    element_bytes: int
    """Of queries, keys, values and context."""


class Kernel(NamedTuple):
    """A way to compute disentangled attention."""

    kept_bytes: Callable[[AttentionSizes], float]
    """What it keeps for the backward pass with dropout on, its inputs included, the context not."""
    working_bytes: Callable[[AttentionSizes], float]
    """What lives besides while it is at work, forward or backward."""


def reference_kept_bytes(sizes: AttentionSizes) -> float:
    """Scores and what they are made of are float32."""
    e, terms = sizes.element_bytes, 2 if sizes.has_position_to_content else 1
    queries, keys = sizes.rows * sizes.queries, sizes.rows * sizes.keys
    inner = sizes.heads * sizes.head_size
    query = queries * inner * 2 * FLOAT32  # once for each product
    memory = keys * inner * (terms * FLOAT32 + e)
    # Softmax, the probabilities that dropout leaves, its mask; and the two masks all heads share.
    pairs = queries * sizes.keys * (sizes.heads * (FLOAT32 + e + 1) + 2)
    # Products with the relative rows, before their gather; the rows themselves, for each sequence.
    products = sizes.heads * sizes.relative_rows * FLOAT32 * (queries + (terms - 1) * keys)
    relative = sizes.rows * sizes.relative_rows * inner * terms * FLOAT32
    return query + memory + pairs + products + relative


def reference_working_bytes(sizes: AttentionSizes) -> float:
    """Four float32 matrices of pair scores live at once in the backward pass, besides what was kept for it."""
    return 4 * FLOAT32 * sizes.rows * sizes.heads * sizes.queries * sizes.keys


#: By name.
KERNELS = {"reference": Kernel(reference_kept_bytes, reference_working_bytes)}
