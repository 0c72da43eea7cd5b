"""The configuration of a fine-tuning run: one frozen, strict tree, as `pretraining.py` is for pretraining.

Sections and keys that mean the same have the same names, so the DeepSpeed JSON is checked against either.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Literal

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import UserPath, at_least, divisors, frozen, positive, probability
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.parallelism import ParallelSection
from deberta_xl.settings.pretraining import (
    CheckpointSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    TrainSection,
)

PAD_MULTIPLE = 8
"""Rows of a batch are padded to the longest of them, rounded up to a multiple of this."""


@frozen
class TaskSection:
    """`task`: what is learned, from which files."""

    name: UserPath | None = None
    """A built-in task, or the path of a TOML file that describes one (docs/finetuning.md)."""
    data: UserPath | None = None
    """Folder with the task's files."""
    valid_share: float = 0.0
    """Hold out this share of the training examples, where there is no validation file; those with an equal first text
    stay together."""
    max_train_examples: int = 0
    """Use only the first examples of the training files; 0 uses all."""
    max_eval_examples: int = 0
    """Evaluate on the first examples only; 0 uses all."""

    def __post_init__(self) -> None:
        at_least(0, max_train_examples=self.max_train_examples, max_eval_examples=self.max_eval_examples)
        if not 0 <= self.valid_share < 1:
            raise ConfigError(f"valid_share={self.valid_share} is not a share; allowed: 0 … 1, 1 excluded")


@frozen
class FinetuneModelSection:
    """`model`: what may differ from the checkpoint's architecture, and the longest input."""

    sequence_length: int = 256
    """Longest input in tokens, [CLS] and [SEP] included; longer ones are cut by the task's rule, and counted."""
    document_stride: int = 128
    """Span tasks read long contexts in windows; tokens that neighbouring windows share."""
    hidden_dropout: float | None = None
    """The checkpoint's when unset."""
    attention_dropout: float | None = None
    """The checkpoint's when unset."""
    head_dropout: float | None = None
    """Before the last projection; hidden_dropout when unset."""
    kernel: str = "auto"
    """How attention is computed: the name of a kernel, or `auto` for the first that supports model and device."""

    def __post_init__(self) -> None:
        at_least(8, sequence_length=self.sequence_length)
        at_least(0, document_stride=self.document_stride)
        for name in ("hidden_dropout", "attention_dropout", "head_dropout"):
            if getattr(self, name) is not None:
                probability(name, getattr(self, name))

    def applied_to(self, architecture: DebertaConfig) -> DebertaConfig:
        """The checkpoint's architecture with this section's dropout. Raises ConfigError when its table is too short."""
        padded = -(-self.sequence_length // PAD_MULTIPLE) * PAD_MULTIPLE
        if padded > architecture.max_position_embeddings and architecture.position_biased_input:
            raise ConfigError(
                f"model.sequence_length={self.sequence_length} does not fit the checkpoint's position table; "
                f"choose at most {architecture.max_position_embeddings // PAD_MULTIPLE * PAD_MULTIPLE}"
            )
        chosen = {name: getattr(self, name) for name in ("hidden_dropout", "attention_dropout")}
        return dataclasses.replace(architecture, **{name: value for name, value in chosen.items() if value is not None})


@frozen
class FinetuneTrainSection(TrainSection):
    """`train`: how long, in which batches, from what."""

    steps: int | None = None
    """Optimizer updates; derived from `epochs` when unset."""
    init: UserPath | None = None
    """Model to start from (--init): what pretraining takes, or a fine-tuned model. It has to be given."""
    epochs: float = 3.0
    """Passes over the training examples."""
    global_batch_size: int = 32
    """Examples per optimizer step over all ranks."""
    fresh_weights: bool = False
    """Take only architecture and tokenizer from `init`, not its weights: what the same model learns from nothing."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by examples / (classes x its examples)."""
    length_bucketing: bool = True
    """Put examples of similar length into a batch, which spares padding; batches still come in random order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(epochs=self.epochs)

    def total_steps(self, num_examples: int) -> int:
        """Optimizer updates of the run."""
        return self.steps or max(1, math.ceil(self.epochs * num_examples / self.global_batch_size))

    def ends_epoch(self, step: int, num_examples: int) -> bool:
        """Whether the last example of a pass is read in this step; so the last step of whole epochs is one of them."""
        consumed = step * self.global_batch_size
        return consumed // num_examples > (consumed - self.global_batch_size) // num_examples


@frozen
class FinetuneOptimizerSection(OptimizerSection):
    """`optimizer`: AdamW, decay on matrices and tables, none on norms and biases."""

    learning_rate: float = 2e-5
    """Peak of the schedule, for the head and, without layer_decay, everything."""
    layer_decay: float = 1.0
    """Each layer learns at this share of the rate of the layer above it; the embeddings come last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay={self.layer_decay} must lie in 0 … 1, 0 excluded; 1 turns it off")


@frozen
class FinetuneScheduleSection(ScheduleSection):
    """`schedule`: linear warm-up, then decay to the end of the run."""

    warmup_share: float = 0.06
    """Warm-up as a share of all steps, where warmup_steps is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        probability("warmup_share", self.warmup_share)

    def for_steps(self, steps: int) -> ScheduleSection:
        """The schedule of a run of `steps`. Raises ConfigError when the warm-up is longer."""
        warmup_steps = self.warmup_steps or round(self.warmup_share * steps)
        if warmup_steps > steps:
            raise ConfigError(
                f"schedule.warmup_steps={warmup_steps} is longer than the run of {steps} steps; set {steps} or less"
            )
        return ScheduleSection(warmup_steps=warmup_steps, decay=self.decay, final_ratio=self.final_ratio)


@frozen
class FinetuneEvaluationSection:
    """`evaluation`: the task's metric on the held-out examples during the run."""

    interval: int | None = None
    """Steps between two evaluations; once an epoch when unset. One more is made at the end."""
    patience: int = 0
    """Stop after this many evaluations without a better metric; 0 trains to the end."""

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, patience=self.patience)


@frozen
class SiftSection:
    """`sift`: adversarial consistency at the normalised embeddings (docs/finetuning.md)."""

    weight: float = 0.0
    """Factor of the adversarial loss (the original's lambda, 5 for its large models); 0 turns SiFT off."""
    variant: Literal["corrected", "original"] = "corrected"
    """`original` repeats the released code; `corrected` departs from it where it is at fault."""
    steps: int = 1
    """Gradient steps of the perturbation (K)."""
    noise: float = 1e-2
    """Deviation of the initial perturbation, in deviations of the normalised embedding; cut off at twice that."""

    def __post_init__(self) -> None:
        at_least(0, weight=self.weight)
        at_least(1, steps=self.steps)
        positive(noise=self.noise)

    @property
    def normalizes_twice(self) -> bool:
        """Whether the embeddings are normalised once more, in evaluation too: a fact of the model it trains."""
        return self.weight > 0 and self.variant == "original"


@frozen
class FinetuneConfig:
    """Everything that defines a fine-tuning run, save the engine's own matters."""

    run: RunSection = field(default_factory=RunSection)
    task: TaskSection = field(default_factory=TaskSection)
    model: FinetuneModelSection = field(default_factory=FinetuneModelSection)
    train: FinetuneTrainSection = field(default_factory=FinetuneTrainSection)
    optimizer: FinetuneOptimizerSection = field(default_factory=FinetuneOptimizerSection)
    schedule: FinetuneScheduleSection = field(default_factory=FinetuneScheduleSection)
    sift: SiftSection = field(default_factory=SiftSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluation: FinetuneEvaluationSection = field(default_factory=FinetuneEvaluationSection)

    def __post_init__(self) -> None:
        size = self.parallel.tensor_parallel_size
        if self.parallel.sequence_parallel and PAD_MULTIPLE % size:
            raise ConfigError(
                f"parallel.sequence_parallel=true with parallel.tensor_parallel_size={size}: batches are padded to a "
                f"multiple of {PAD_MULTIPLE} tokens, which it does not divide; choose one of {divisors(PAD_MULTIPLE)}"
            )
