"""The configuration of a run: one frozen, strict tree (`presets.py` reads it from a preset and overrides).

Nothing here imports torch, so a mistyped key is refused before the first expensive second. Every fact has one home:
sizes, batch arithmetic, optimizer and schedule live here, engine matters in the DeepSpeed JSON (`deepspeed_config.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import FLOAT32_ROOM, UserPath, at_least, at_most, frozen, positive, probability
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import (
    READERS,
    AutoregressiveSection,
    GeneratorSection,
    ReplacedTokensSection,
    check_generator,
    check_read,
)
from deberta_xl.settings.parallelism import ParallelSection, check_slices
from deberta_xl.settings.row_lengths import SHORTEST, Stretch, check_lengths, read_shares, stretches


@frozen
class ModelSection(DebertaConfig):
    """`model`: the architecture, and the length at which it is run."""

    vocab_size: int | None = None
    """Taken from the data's tokenizer when unset; if set, never smaller than it."""
    sequence_length: int = 512
    """Tokens in a row of a batch, [CLS] and [SEP] included."""
    kernel: str = "auto"
    """How attention is computed: the name of a kernel, or `auto` for the first that supports model and device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SHORTEST <= self.sequence_length <= self.max_position_embeddings:
            raise ConfigError(
                f"sequence_length={self.sequence_length} does not fit the position table: choose {SHORTEST} … "
                f"max_position_embeddings={self.max_position_embeddings}, or enlarge max_position_embeddings"
            )

    def architecture(self, tokenizer_vocab_size: int) -> DebertaConfig:
        """The architecture with its vocabulary: the tokenizer's, or the larger one that is set here."""
        vocab_size = self.vocab_size or tokenizer_vocab_size
        if vocab_size < tokenizer_vocab_size:
            raise ConfigError(
                f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; "
                f"leave it unset or set at least {tokenizer_vocab_size}"
            )
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(DebertaConfig)}
        return DebertaConfig(**values | {"vocab_size": vocab_size})


@frozen
class RunSection:
    """`run`: where the run keeps everything."""

    folder: UserPath = "runs/default"
    """Configuration, metrics, TensorBoard files, checkpoints. The same command in the same folder resumes."""


@frozen
class DataSection:
    """`data`: what is read and how it is masked."""

    train: UserPath | None = None
    """Prefix of the training dataset (PREFIX.bin, PREFIX.idx, PREFIX.manifest.json, PREFIX.tokenizer/)."""
    valid: UserPath | None = None
    """Prefix of the held-out dataset; none when unset."""
    attend_across_documents: bool = False
    """Let attention, convolution and positions run across the documents of a packed row, as the original did."""
    masking: Literal["unbiased", "original"] = "unbiased"
    """`original` masks as microsoft/DeBERTa does (NGramMaskGenerator): ever less towards the end of each row, and whole
    clauses of scripts without spaces."""
    mask_probability: float = 0.15
    """Share of the tokens to predict."""
    max_ngram: int = 3
    """Longest span of whole words masked together; 1 masks single words, n-grams are drawn with p ~ 1/n."""
    replace_with_mask: float = 0.8
    """Share of predicted tokens shown as [MASK]."""
    replace_with_random: float = 0.1
    """Share of predicted tokens shown as a random token; the rest is shown unchanged."""

    def __post_init__(self) -> None:
        probability("mask_probability", self.mask_probability)
        at_least(1, max_ngram=self.max_ngram)
        if self.mask_probability == 0:
            raise ConfigError("mask_probability=0 leaves nothing to predict; the paper uses 0.15")
        if min(self.replace_with_mask, self.replace_with_random) < 0 or (
            self.replace_with_mask + self.replace_with_random > 1 + 1e-9
        ):
            raise ConfigError(
                f"replace_with_mask={self.replace_with_mask} and replace_with_random={self.replace_with_random} "
                "must be shares whose sum is at most 1"
            )


@frozen
class TrainSection:
    """`train`: how long, in which batches, from what."""

    steps: int = 1000
    """Optimizer updates."""
    seed: int = 1
    """Seed of weights, data order, masks and dropout."""
    global_batch_size: int = 256
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: int = 8
    """Sequences in one forward on one data-parallel rank."""
    max_grad_norm: float = 1.0
    """Clipping bound of the global gradient norm; 0 does not clip."""
    init: UserPath | None = None
    """Model whose weights to start from: a run, checkpoint or weights folder, or one of Hugging Face's or the original
    release's; fresh weights when unset."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    deterministic: bool = False
    """Ask torch for deterministic kernels (a GPU's gather uses atomics otherwise)."""
    log_interval: int = 10
    """Steps between two lines of metrics."""
    profile: str | None = None
    """START:STOP, steps to trace with torch's profiler into the run folder."""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, global_batch_size=self.global_batch_size)
        at_least(1, micro_batch_size=self.micro_batch_size, log_interval=self.log_interval)
        at_least(0, seed=self.seed, max_grad_norm=self.max_grad_norm)
        self.profile_steps()

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches per step on each of `data_parallel_size` ranks.

        Raises ConfigError, with the sum and the nearest batch sizes that divide, when they do not.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_pass:
            below = self.global_batch_size // per_pass * per_pass
            nearest = " or ".join(str(n) for n in (below, below + per_pass) if n)
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of train.micro_batch_size x "
                f"data-parallel ranks = {self.micro_batch_size} x {data_parallel_size} = {per_pass}; "
                f"nearest: train.global_batch_size={nearest}"
            )
        return self.global_batch_size // per_pass

    def profile_steps(self) -> range:
        """The steps to profile, empty when unset."""
        if self.profile is None:
            return range(0)
        start, colon, stop = self.profile.partition(":")
        if not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise ConfigError(f"profile={self.profile!r} is not START:STOP with START < STOP, for example 10:13")
        return range(int(start), int(stop))


@frozen
class PretrainingTrainSection(TrainSection):
    """`train`: what is learned, how long, in which batches, from what."""

    objective: str = "masked_lm"
    """`masked_lm`, `replaced_tokens`, `causal`, `prefix`, `mixed`, or a class of yours as PACKAGE.MODULE:CLASS."""
    lengths: str | None = None
    """Shorter rows first, as LENGTH:SHARE of the steps in turn (512:0.8,2048:0.15); the other steps have rows of
    `model.sequence_length`, which batch sizes count: in the place of each there are several shorter ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_shares(self.lengths)


@frozen
class OptimizerSection:
    """`optimizer`: AdamW, decay on matrices and tables, none on norms and biases."""

    learning_rate: float = 2e-4
    """Peak of the schedule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    bias_correction: bool = True
    """False is the form of microsoft/DeBERTa (XAdam), to continue released weights as they were trained."""

    def __post_init__(self) -> None:
        at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        at_most(FLOAT32_ROOM, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        positive(epsilon=self.epsilon)  # without it a weight that gets no gradient is divided 0 / 0
        probability("beta1", self.beta1)
        probability("beta2", self.beta2)


@frozen
class ScheduleSection:
    """`schedule`: linear warm-up, then decay to the end of the run."""

    warmup_steps: int = 0
    """Steps of linear rise to the peak."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up."""
    final_ratio: float = 0.0
    """What the decay falls to, as a share of the peak; it would be reached one update after the last."""

    def __post_init__(self) -> None:
        at_least(0, warmup_steps=self.warmup_steps)
        if not 0 <= self.final_ratio <= 1:
            raise ConfigError(f"final_ratio={self.final_ratio} is not a share between 0 and 1")


@frozen
class CheckpointSection:
    """`checkpoint`: how often the run can be resumed from."""

    interval: int = 1000
    """Steps between two checkpoints; one more is always written at the end and when asked to stop."""
    keep: int = 3
    """Newest checkpoints to keep; 0 keeps all."""

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, keep=self.keep)


@frozen
class EvaluationSection:
    """`evaluation`: held-out loss during the run (needs `data.valid`)."""

    interval: int = 1000
    """Steps between two evaluations; one more is made at the end."""
    max_samples: int = 2048
    """Rows of the held-out dataset to use, from all over it and the same ones in every run; 0 uses all."""

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, max_samples=self.max_samples)


@frozen
class RunConfig:
    """Everything that defines a pretraining run, save the engine's own matters."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: PretrainingTrainSection = field(default_factory=PretrainingTrainSection)
    generator: GeneratorSection = field(default_factory=GeneratorSection)
    replaced_tokens: ReplacedTokensSection = field(default_factory=ReplacedTokensSection)
    autoregressive: AutoregressiveSection = field(default_factory=AutoregressiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        if self.schedule.warmup_steps > self.train.steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is longer than train.steps={self.train.steps}; "
                f"set schedule.warmup_steps to {self.train.steps} or less"
            )
        if self.parallel.sequence_parallel:
            check_slices(self.model, self.parallel)
        slices = self.parallel.tensor_parallel_size if self.parallel.sequence_parallel else 1
        check_lengths(self.train.lengths, self.model.sequence_length, slices)
        check_read(self.train.objective, {name: getattr(self, name) for name in READERS})
        if self.train.objective == "replaced_tokens":
            rate = self.optimizer.learning_rate
            check_generator(self.model.architecture(1), self.generator, self.replaced_tokens.sharing, rate)

    @property
    def stretches(self) -> list[Stretch]:
        """The lengths of rows, in turn, and the steps that have them."""
        return stretches(self.train.lengths, self.model.sequence_length, self.train.steps)

    def stretch_at(self, step: int) -> Stretch:
        """The one that has this step."""
        return next((found for found in self.stretches if step <= found.last_step), self.stretches[-1])
