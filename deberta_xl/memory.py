"""What a run will need of a device's memory, estimated before anything is built. Imports no torch.

Weights, gradients and optimizer state follow from the sizes. Activations are counted by hand from the model's plain
attention (what autograd keeps of each layer), without the allocator's losses; nothing here was measured on a GPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from deberta_xl.architecture import DebertaConfig

GIB = 2**30
OPTIMIZER_BYTES = 12
"""Per parameter: the fp32 master copy and Adam's two moments."""
GRADIENT_BYTES = 4
"""Per parameter: gradients are accumulated in fp32 (`data_types.grad_accum_dtype` of the shipped JSONs)."""
LABELLED_SHARE = 0.15
KEPT_HIDDEN, KEPT_INNER, KEPT_PAIRS = 12, 2, 4
"""Tensors that the backward pass of a layer needs: as wide as the hidden state, as the feed-forward block, and as the
pairs of positions in every head (content and two gathered position terms, probabilities)."""


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a projection with bias."""
    return inputs * outputs + outputs


def count_parameters(config: DebertaConfig) -> int:
    """Parameters of the masked language model; the vocabulary has to be known."""
    hidden, inner, width, embedding = (
        config.hidden_size, config.attention_size, config.intermediate_size, config.embedding_width,
    )  # fmt: skip
    terms = 2 if config.has_position_to_content else 1
    own_positions = 0 if config.share_att_key else terms * linear(hidden, inner)
    layer = 3 * linear(hidden, inner) + linear(inner, hidden) + own_positions
    layer += linear(hidden, width) + linear(width, hidden) + 4 * hidden
    total = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * embedding + 2 * hidden
    total += embedding * hidden if embedding != hidden else 0
    total += 2 * config.relative_span * hidden + (2 * hidden if config.normalize_relative_table else 0)
    total += config.num_layers * layer
    if config.conv_kernel_size:
        total += config.conv_kernel_size * hidden * hidden // config.conv_groups + 3 * hidden
    return total + linear(hidden, embedding) + 2 * embedding + config.vocab_size


class Memory(NamedTuple):
    """GiB per device."""

    states: float
    activations: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.states + self.activations


def estimate_memory(
    config: DebertaConfig,
    *,
    zero_stage: int,
    precision: Literal["fp32", "bf16", "fp16"],
    data_parallel_size: int,
    tensor_parallel_size: int,
    micro_batch_size: int,
    sequence_length: int,
    recomputes: bool,
) -> Memory:
    """What one rank holds at the height of a step."""
    element = 4 if precision == "fp32" else 2
    parameters = count_parameters(config) / tensor_parallel_size
    weights = element * parameters / (data_parallel_size if zero_stage >= 3 else 1)
    gradients = GRADIENT_BYTES * parameters / (data_parallel_size if zero_stage >= 2 else 1)
    states = weights + gradients + OPTIMIZER_BYTES * parameters / data_parallel_size
    tokens = micro_batch_size * sequence_length
    divided = KEPT_INNER * config.intermediate_size + KEPT_PAIRS * config.num_heads * sequence_length
    layer = element * tokens * (KEPT_HIDDEN * config.hidden_size + divided / tensor_parallel_size)
    kept = element * tokens * config.hidden_size if recomputes else layer
    logits = 3 * 4 * LABELLED_SHARE * tokens * config.vocab_size / tensor_parallel_size
    return Memory(states / GIB, ((config.num_layers + 1) * kept + recomputes * layer + logits) / GIB)
