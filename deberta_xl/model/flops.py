"""Floating-point operations of a training step, and the peak of known devices.

Counted are the matrix products that the model needs by its definition (2 operations per multiply-add); the backward
pass counts twice the forward. Recomputation under activation checkpointing is work, not progress: it is not counted.
"""

from __future__ import annotations

from deberta_xl.architecture import EMD_PASSES, DebertaConfig

#: Dense bf16 peak, FLOP/s, by a part of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}


def peak_flops(device_name: str) -> float | None:
    """The device's bf16 peak, or None when it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def unit_flops(config: DebertaConfig, rows: int, sequence_length: int, num_labels: float) -> list[float]:
    """Operations of one forward over `rows` sequences with `num_labels` labelled positions, by unit of the model.

    Unit 0 is the embeddings (table look-ups: none), units 1 … N−1 are the layers before the last (the convolution
    belongs to the first of them), unit N is the last layer (as the enhanced mask decoder applies it) with the head.
    """
    hidden, inner, width = config.hidden_size, config.attention_size, config.intermediate_size
    tokens = rows * sequence_length
    terms = 2 if config.has_position_to_content else 1
    table = 2 * config.relative_span
    relative = 2 * terms * table * hidden * inner

    def query_side(queries: float) -> float:
        """Query and output projection, scores and context, feed-forward."""
        scores = 2 * sequence_length * inner + table * inner
        return 2 * queries * (2 * hidden * inner + scores + 2 * hidden * width)

    # Key and value projection, and the position-to-content product.
    key_side = 2 * tokens * (2 * hidden * inner + (terms - 1) * table * inner)
    layer = query_side(tokens) + key_side + relative
    decoder = layer if config.position_biased_input else key_side + EMD_PASSES * (query_side(num_labels) + relative)
    head = 2 * num_labels * config.embedding_width * (hidden + config.vocab_size)
    units = [0.0, *[layer] * (config.num_layers - 1), decoder + head]
    if config.conv_kernel_size:
        units[1] += 2 * tokens * config.conv_kernel_size * hidden * hidden / config.conv_groups
    return units


def forward_flops(config: DebertaConfig, rows: int, sequence_length: int, num_labels: float) -> float:
    """Operations of one forward over `rows` sequences with `num_labels` labelled positions altogether."""
    return sum(unit_flops(config, rows, sequence_length, num_labels))


def step_flops(config: DebertaConfig, rows: int, sequence_length: int, num_labels: float) -> float:
    """Operations of one optimizer step: forward and backward."""
    return 3 * forward_flops(config, rows, sequence_length, num_labels)
