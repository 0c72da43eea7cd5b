"""How the columns of a vocabulary are cut into blocks, whose logits exist one after the other. Without torch."""

from __future__ import annotations

ELEMENTS_AT_ONCE = 2**25
"""Logits of a block, about: few enough to need little memory, so many that products are large."""
ALIGNMENT = 128
"""Every block has a multiple of so many columns. GPUs multiply well what begins at multiples of 16 bytes in every row,
and works in tiles of this width."""


def blocks_of(num_positions: int, num_columns: int) -> list[range]:
    """The columns of each block; what is left of a whole multiple comes last, in a block of its own, to be padded."""
    whole = num_columns // ALIGNMENT * ALIGNMENT
    at_once = widest_block(num_positions)
    blocks = [range(first, min(first + at_once, whole)) for first in range(0, whole, at_once)]
    return [*blocks, range(whole, num_columns)] if whole < num_columns else blocks


def widest_block(num_positions: float) -> int:
    """Columns of a block with so many positions."""
    return max(1, int(ELEMENTS_AT_ONCE / max(1, num_positions)) // ALIGNMENT) * ALIGNMENT
