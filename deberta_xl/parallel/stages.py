"""Which layers a pipeline stage has: a split balanced by computed cost, and what it leaves idle.

The model is a row of units (`model/parts.py`): embeddings, the layers before the last, and the last layer with the
enhanced mask decoder and the head. A stage has neighbouring ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import Part, unit_flops


class Split(NamedTuple):
    """How the units are spread over the stages."""

    borders: tuple[int, ...]
    """Stage s has the units borders[s] … borders[s + 1] − 1."""
    costs: tuple[float, ...]
    """Operations of a stage for one micro-batch, forward."""

    def units(self, stage: int) -> range:
        """The units of a stage."""
        return range(self.borders[stage], self.borders[stage + 1])

    def layers(self, stage: int) -> range:
        """The encoder layers of a stage."""
        return range(max(0, self.borders[stage] - 1), self.borders[stage + 1] - 1)

    @property
    def num_stages(self) -> int:
        """How many there are."""
        return len(self.costs)

    @property
    def imbalance(self) -> float:
        """Cost of the dearest stage over the mean: 1 when all wait for nobody."""
        return max(self.costs) * self.num_stages / sum(self.costs)

    def idle_share(self, num_micro_batches: int) -> float:
        """Share of the ranks' time that the schedule and the imbalance leave idle (the bubble), 0 … 1."""
        turns = num_micro_batches + self.num_stages - 1
        return 1 - num_micro_batches / (turns * self.imbalance)

    def describe(self, num_micro_batches: int) -> str:
        """For the start of a run: layers and share of the cost of each stage, and the expected bubble."""
        total = sum(self.costs)
        parts = []
        for stage in range(self.num_stages):
            layers = self.layers(stage)
            names = f"layers {layers.start}–{layers.stop - 1}" if len(layers) > 1 else f"layer {layers.start}"
            names = ("embeddings, " if stage == 0 else "") + names
            names += ", prediction" if stage == self.num_stages - 1 else ""
            parts.append(f"{names} ({self.costs[stage] / total:.0%} of the work)")
        idle = self.idle_share(num_micro_batches)
        return f"{'; '.join(parts)}; {idle:.0%} idle with {num_micro_batches} micro-batches"


def split_model(parts: Sequence[Part], num_stages: int, load: Load) -> Split:
    """The split whose dearest stage is cheapest, and among those the most even one; `load` is a micro-batch's."""
    units = tuple(unit_flops(parts, load))
    borders = balanced_borders(units, num_stages)
    costs = tuple(sum(units[a:b]) for a, b in pairwise(borders))
    return Split(borders, costs)


def balanced_borders(costs: tuple[float, ...], num_parts: int) -> tuple[int, ...]:
    """Borders of `num_parts` neighbouring, non-empty parts: least largest sum, then least sum of squares."""

    @cache
    def best(start: int, parts: int) -> tuple[float, float, tuple[int, ...]]:
        """Largest sum, sum of squares and borders for the units from `start` on."""
        if parts == 1:
            rest = sum(costs[start:])
            return rest, rest**2, (start, len(costs))
        candidates = []
        for end in range(start + 1, len(costs) - parts + 2):
            first = sum(costs[start:end])
            largest, squares, borders = best(end, parts - 1)
            candidates.append((max(first, largest), squares + first**2, (start, *borders)))
        return min(candidates)

    return best(0, num_parts)[2]
