"""When sums of gradients may be reduced: as soon as no more will be added to them, in an order that all ranks share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deberta_xl.base.errors import ConfigError


class Readiness:
    """What has arrived of several sums in the last backward pass of a step.

    Ranks have to begin their collective operations in the same order, and what a graph computes first may differ from
    rank to rank. So in the first step nothing is begun early; the order in which one rank then had its sums complete is
    everyone's afterwards (`agree`). A rank that has another waits for what is before; what does not arrive is left for
    the end, as `rest`.
    """

    def __init__(self, sizes: Sequence[int]):
        """`sizes`: how many gradients are added to each sum."""
        self.sizes = sizes
        self.order: Sequence[int] | None = None
        """In which sums are begun before the step's end; None before it is known."""
        self.forget()

    def forget(self) -> None:
        """A step is over."""
        self.missing = [set(range(size)) for size in self.sizes]
        self.complete: list[int] = []
        """Sums to which everything has been added."""
        self.begun: list[int] = []

    def arrive(self, number: int, gradient: int) -> list[int]:
        """A gradient was added to a sum for the last time; the sums that are to be begun now.

        Raises ConfigError where it was added before, since the sum may be on its way: the objective may be a user's.
        """
        if gradient not in self.missing[number]:
            raise ConfigError(
                "a parameter got its gradient twice in the last backward pass of a step: it is to come from the one "
                'loss that an objective gives back. Give back the sum of several, or set "overlap_comm": false in the '
                "DeepSpeed configuration"
            )
        self.missing[number].remove(gradient)
        if self.missing[number]:
            return []
        self.complete.append(number)
        following = (self.order or ())[len(self.begun) :]
        now = list(itertools.takewhile(lambda number: not self.missing[number], following))
        self.begun += now
        return now

    def rest(self) -> list[int]:
        """The sums that are still to be begun, in their order."""
        order = [*(self.order or ()), *range(len(self.sizes))]
        return [number for number in dict.fromkeys(order) if number not in self.begun]
