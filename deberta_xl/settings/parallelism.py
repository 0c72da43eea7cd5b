"""How one replica of a model is divided over ranks."""

from __future__ import annotations

import math
from typing import Protocol

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import at_least, divisors, frozen


@frozen
class ParallelSection:
    """`parallel`: how one replica of the model is divided over ranks; the remaining factor is data parallelism."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer. Must divide the heads and the feed-forward width; stay inside one node."""
    sequence_parallel: bool = False
    """Whether those ranks also divide the sequence between the shared parts of a layer, which saves activation memory.
    Their number must then divide `model.sequence_length`."""
    pipeline_parallel_size: int = 1
    """Stages, each with some of the layers, the last with the enhanced mask decoder. At most the number of layers."""

    def __post_init__(self) -> None:
        at_least(1, tensor_parallel_size=self.tensor_parallel_size, pipeline_parallel_size=self.pipeline_parallel_size)
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ConfigError(
                "sequence_parallel=true needs tensor_parallel_size of 2 or more: it divides the sequence over the "
                "ranks that share each layer; raise that or set parallel.sequence_parallel=false"
            )


class Sliced(Protocol):
    """What of a model's section is divided."""

    sequence_length: int
    num_heads: int
    intermediate_size: int


def check_slices(model: Sliced, parallel: ParallelSection) -> None:
    """Refuse a sequence that does not divide over the ranks of sequence parallelism. Raises ConfigError."""
    length, size = model.sequence_length, parallel.tensor_parallel_size
    if length % size:
        below = length - length % size
        lengths = " or ".join(str(n) for n in (below, below + size) if n)
        common = math.gcd(length, model.num_heads, model.intermediate_size)
        sizes = [n for n in divisors(common) if n > 1]
        other_sizes = f"parallel.tensor_parallel_size one of {sizes}, or " if sizes else ""
        raise ConfigError(
            f"model.sequence_length={length} does not divide over parallel.tensor_parallel_size={size} ranks, as "
            f"parallel.sequence_parallel=true asks for; possible: model.sequence_length={lengths}, "
            f"{other_sizes}parallel.sequence_parallel=false"
        )
