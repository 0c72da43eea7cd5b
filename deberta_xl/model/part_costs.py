"""What the parts of a model cost in a forward pass: operations, and bytes on a rank. Arithmetic, without torch.

Counted are the matrix products that the model needs by its definition (2 operations per multiply-add), whatever kernel
computes them, and the bytes that autograd keeps for the backward pass, but for means, deviations and other small
change. `parts.py` says which part has which of these costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from deberta_xl.kernels.registry import FLOAT32, KERNELS, AttentionSizes
from deberta_xl.kernels.vocabulary_blocks import widest_block
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig

LABELS_AT_A_TIME, SLOTS_AT_A_TIME = 64, 32
"""Labelled positions of a micro-batch, and slots for them in each sequence, are filled up to a multiple of these: their
number changes with every micro-batch, and so would the size of the largest tensors."""


def filled_up(number: float, at_a_time: int) -> int:
    """The next multiple."""
    return math.ceil(number / at_a_time) * at_a_time


class Load(NamedTuple):
    """What a forward pass is given."""

    rows: int
    """Sequences."""
    length: int
    """Tokens of each."""
    labelled: float = 0
    """Positions to predict, of all sequences together."""

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return self.rows * self.length

    @property
    def slots(self) -> int:
        """For labelled positions in each sequence, as they are filled up."""
        return min(filled_up(self.labelled / self.rows, SLOTS_AT_A_TIME), self.length)

    def in_rows_of(self, length: int) -> Load:
        """The same tokens in rows of another length, which divides this one."""
        return Load(self.rows * (self.length // length), length, self.labelled)

    def times(self, number: int) -> Load:
        """So many loads in one."""
        return Load(self.rows * number, self.length, self.labelled * number)


class Division(NamedTuple):
    """What a rank holds of a forward pass, and how finely."""

    element_bytes: int
    """Of weights and states."""
    kernel: str
    """What computes the attention."""
    tensor_parallel_size: int = 1
    """Ranks over which heads, inner widths and the vocabulary are divided."""
    slices: int = 1
    """Ranks over which the sequence is divided between them."""


class Activations(NamedTuple):
    """Bytes that a part takes on a rank for one load."""

    kept: float = 0.0
    """What autograd keeps until the backward pass."""
    entry: float = 0.0
    """What is kept instead where the part is recomputed."""
    working: float = 0.0
    """What lives besides while the part is at work."""


# Operations of a forward pass.


def no_work(load: Load) -> float:
    """Looking up rows of a table is not counted."""
    return 0.0


def rows_in_reach(config: DebertaConfig, length: int) -> int:
    """Rows of the relative table that pairs of a sequence fall into; others are not projected
    (`kernels/relative_index.py`, there from the offsets themselves)."""
    row, middle = length - 1, config.position_buckets // 2
    if middle:
        row = min(row, config.relative_reach - 1)
    if middle and row > middle:
        share = math.log(row / middle) / math.log((config.relative_reach - 1) / middle)
        row = math.ceil(share * (middle - 1)) + middle
    rows = min(2 * row + 1, config.relative_rows)
    return rows if 8 * rows <= 7 * config.relative_rows else config.relative_rows


def attended_flops(config: DebertaConfig, load: Load, queries: float, passes: int) -> float:
    """A layer whose `queries` attend `passes` times to the sequences they stand in, whose keys are computed once."""
    hidden, inner = config.hidden_size, config.attention_size
    c2p, p2c, rows = config.has_content_to_position, config.has_position_to_content, config.relative_rows
    # Query and output projection, scores and context, feed-forward.
    scores = 2 * load.length * inner + c2p * rows * inner
    query_side = 2 * queries * (2 * hidden * inner + scores + 2 * hidden * config.intermediate_size)
    # Key and value projection, and the position-to-content product.
    key_side = 2 * load.tokens * (2 * hidden * inner + p2c * rows * inner)
    relative = 2 * (c2p + p2c) * rows_in_reach(config, load.length) * hidden * inner
    return key_side + passes * (query_side + relative)


def layer_flops(config: DebertaConfig, load: Load) -> float:
    """A layer in which every token attends."""
    return attended_flops(config, load, load.tokens, passes=1)


def shared_decoder_flops(config: DebertaConfig, load: Load) -> float:
    """The last layer as the enhanced mask decoder applies it, to the labelled positions."""
    return attended_flops(config, load, load.labelled, config.num_decoder_passes)


def decoder_layer_flops(config: DebertaConfig, load: Load) -> float:
    """A layer of the decoder's own: one pass over the labelled positions."""
    return attended_flops(config, load, load.labelled, passes=1)


def convolution_flops(config: DebertaConfig, load: Load) -> float:
    """The n-gram convolution."""
    return 2 * load.tokens * config.conv_kernel_size * config.hidden_size * config.hidden_size / config.conv_groups


def vocabulary_flops(config: DebertaConfig, load: Load) -> float:
    """The masked-LM head on the labelled positions, the product with the word table included."""
    return 2 * load.labelled * config.embedding_width * (config.hidden_size + config.vocab_size)


def linear_flops(inputs: int, outputs: int, positions: Callable[[Load], float], load: Load) -> float:
    """A projection of chosen positions."""
    return 2 * positions(load) * inputs * outputs


def head_positions(head: HeadConfig, load: Load) -> float:
    """The positions that a task's head reads: [CLS] of each sequence, or every token."""
    return load.rows if head.is_pooled else load.tokens


# Bytes of a forward pass.


def no_bytes(load: Load, division: Division) -> Activations:
    """So little that it is not counted."""
    return Activations()


def layer_bytes(config: DebertaConfig, load: Load, queries: float, division: Division) -> float:
    """What autograd keeps of a layer with so many queries in each sequence (dropout on), its input included."""
    e, ranks = division.element_bytes, division.tensor_parallel_size
    inner, width = config.attention_size / ranks, config.intermediate_size / ranks
    # What enters attention and feed-forward; two normalised sums and two dropout masks; the context; the up-projection
    # before and after its activation.
    per_token = config.hidden_size * (2 * e + (2 * e + 2) / division.slices) + inner * e + width * 2 * e
    # The relative table behind its dropout, and the mask.
    table = config.relative_rows * config.hidden_size * (e + 1)
    attention = KERNELS[division.kernel].kept_bytes(attention_sizes(config, load, queries, division))
    return load.rows * queries * per_token + attention + table


def attention_sizes(config: DebertaConfig, load: Load, queries: float, division: Division) -> AttentionSizes:
    """A layer's attention, with so many queries in each sequence."""
    return AttentionSizes(
        load.rows, queries, load.length, config.num_heads / division.tensor_parallel_size, config.head_size,
        config.relative_rows, config.has_content_to_position, config.has_position_to_content, division.element_bytes,
        config.relative_reach,
    )  # fmt: skip


def layer_activations(config: DebertaConfig, load: Load, division: Division) -> Activations:
    """A layer in which every token attends."""
    return Activations(
        kept=layer_bytes(config, load, load.length, division),
        entry=load.tokens * config.hidden_size * division.element_bytes / division.slices,
        working=KERNELS[division.kernel].working_bytes(attention_sizes(config, load, load.length, division)),
    )


def shared_decoder_activations(config: DebertaConfig, load: Load, division: Division) -> Activations:
    """The last layer as the enhanced mask decoder applies it: its passes over the labelled positions, and no other.

    For temporaries it has those of a layer in which every token attends: more than its own, as much as small models
    were seen to take besides.
    """
    passes = config.num_decoder_passes
    return Activations(
        kept=passes * decoder_pass_bytes(config, load, division),
        entry=decoder_entry_bytes(config, load, division, passes),
        working=layer_activations(config, load, division).working,
    )


def decoder_layer_activations(config: DebertaConfig, load: Load, division: Division) -> Activations:
    """A layer of the decoder's own: its pass."""
    return Activations(
        kept=decoder_pass_bytes(config, load, division),
        entry=decoder_entry_bytes(config, load, division, passes=1),
        working=KERNELS[division.kernel].working_bytes(attention_sizes(config, load, load.slots, division)),
    )


def decoder_entry_bytes(config: DebertaConfig, load: Load, division: Division, passes: int) -> float:
    """What passes with the same keys and values begin with, and those, which stay where the passes are recomputed."""
    memory = 2 * load.tokens * config.attention_size / division.tensor_parallel_size
    return (passes * load.rows * load.slots * config.hidden_size + memory) * division.element_bytes


def decoder_pass_bytes(config: DebertaConfig, load: Load, division: Division) -> float:
    """What autograd keeps of a pass over the labelled positions, of the whole sequence on every rank."""
    return layer_bytes(config, load, load.slots, division._replace(slices=1))


def vocabulary_activations(config: DebertaConfig, load: Load, division: Division) -> Activations:
    """A block of logits with what is computed of them, in float32 or in their place."""
    labels = filled_up(load.labelled, LABELS_AT_A_TIME)
    columns = min(-(-config.vocab_size // division.tensor_parallel_size), widest_block(labels))
    beside = FLOAT32 if division.element_bytes < FLOAT32 else 0
    return Activations(working=labels * columns * (division.element_bytes + beside))
