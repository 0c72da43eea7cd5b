"""What a run computes: the parts of its model, what one example gives them to do, and how often."""

from __future__ import annotations

from typing import NamedTuple

from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import (
    Part,
    forward_flops,
    masked_lm_parts,
    num_parameters,
    replaced_tokens_parts,
    task_parts,
)
from deberta_xl.parallel.stages import Split, split_model
from deberta_xl.planning.cost import FORWARD_AND_BACKWARD
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.mask import Mask, mask_of
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.settings.pretraining import RunConfig

SIFT_STEP = 2
"""Forward passes that a step of SiFT's perturbation is worth: there and back, without the weights' gradients."""


MEAN_REST = 0.5
"""Share of a document that stands behind its prefix, whose length is drawn evenly."""


class Workload(NamedTuple):
    """A model, and what training asks of it."""

    architecture: DebertaConfig
    parts: list[Part]
    example: Load
    """Of one sequence; in fine-tuning of one example at its longest, with all its options."""
    forwards: int = FORWARD_AND_BACKWARD
    """Forward passes that training on an example is worth."""
    kept_passes: int = 1
    """Forward passes that are kept for the backward pass at once."""
    largest: Load | None = None
    """Of the sequence that takes most memory, where that is another than the mean one."""
    mask: Mask = "bidirectional"
    """What attention is asked for."""
    turns: tuple[str, ...] = ("",)
    """Beginnings of the names of parts that are computed, forward and backward, one after the other: of such, only one
    has activations at a time."""

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return num_parameters(self.parts)

    def split(self, num_stages: int, micro_batch_size: int) -> Split:
        """The even spread over pipeline stages."""
        return split_model(self.parts, num_stages, self.example.times(micro_batch_size))

    def step_flops(self, num_examples: int) -> float:
        """Operations of an optimizer step."""
        return self.forwards * forward_flops(self.parts, self.example.times(num_examples))

    def in_rows_of(self, length: int) -> Workload:
        """The same of shorter rows, several in the place of one."""
        return self._replace(example=self.example.in_rows_of(length))


def pretraining_workload(architecture: DebertaConfig, run: RunConfig, objective: str | None) -> Workload:
    """What a built-in objective computes; of None, a user's that is below none of them, what `masked_lm` would."""
    if objective == "replaced_tokens":
        return replaced_tokens_workload(architecture, run)
    mask = mask_of(objective, run)
    return masked_lm_workload(architecture, run, mask, run.autoregressive.share if objective == "mixed" else 1.0)


def replaced_tokens_workload(architecture: DebertaConfig, run: RunConfig) -> Workload:
    """Pretraining of a discriminator with its generator."""
    section, length = run.replaced_tokens, run.model.sequence_length
    parts = replaced_tokens_parts(architecture, generator_architecture(architecture, run.generator), section.sharing)
    turns = ("generator.", "discriminator.") if section.training == "decoupled" else ("",)
    return Workload(architecture, parts, Load(1, length, run.data.mask_probability * length), turns=turns)


def masked_lm_workload(
    architecture: DebertaConfig, run: RunConfig, mask: Mask = "bidirectional", share: float = 1.0
) -> Workload:
    """Pretraining of a masked-LM model: full rows, of which a share is predicted; under another mask than the
    bidirectional one in a `share` of them."""
    length, masked = run.model.sequence_length, run.data.mask_probability
    parts = masked_lm_parts(architecture)
    if mask == "bidirectional":
        return Workload(architecture, parts, Load(1, length, masked * length))
    after = {"causal": 1.0, "prefix": MEAN_REST}[mask]
    example = Load(1, length, (share * after + (1 - share) * masked) * length)
    return Workload(architecture, parts, example, largest=Load(1, length, length), mask=mask)


def task_workload(architecture: DebertaConfig, head: HeadConfig, run: FinetuneConfig, num_options: int) -> Workload:
    """Fine-tuning. SiFT adds the steps of its perturbation, and a second pass beside the clean one."""
    example = Load(num_options, run.model.sequence_length)
    parts = task_parts(architecture, head)
    if not run.sift.weight:
        return Workload(architecture, parts, example)
    forwards = 2 * FORWARD_AND_BACKWARD + SIFT_STEP * run.sift.steps
    return Workload(architecture, parts, example, forwards, kept_passes=2)
