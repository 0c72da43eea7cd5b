"""Operations of training, and what they and the checkpoints amount to over a run.

Recomputation under activation checkpointing is work, not progress: it is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import Part, forward_flops

FORWARD_AND_BACKWARD = 3
"""Forward passes that training on something is worth: the backward pass has twice the work."""
REFERENCE_FLOPS = 1e14
"""Operations per second and rank that days are told for: a round number to scale from, not a promise."""
MASTER_AND_MOMENTS = 12
"""Bytes of optimizer state per parameter: float32 weight and Adam's two moments."""


def step_flops(parts: Sequence[Part], load: Load) -> float:
    """Operations of one optimizer step: forward and backward over `load`, the whole batch."""
    return FORWARD_AND_BACKWARD * forward_flops(parts, load)


def rank_hours(flops: float) -> float:
    """Hours of one rank that keeps up REFERENCE_FLOPS."""
    return flops / REFERENCE_FLOPS / 3600
