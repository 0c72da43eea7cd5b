"""The configuration of a run: one frozen, strict tree (`config_file.py` reads it from a preset and overrides).

Nothing here imports torch, so a mistyped key is refused before the first expensive second. Every fact has one home:
sizes, batch arithmetic, optimizer and schedule live here, engine matters in the DeepSpeed JSON (`deepspeed_config.py`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)

Activation = Literal["gelu", "relu", "tanh"]

Class = TypeVar("Class", bound=type)


class ConfigError(ValueError):
    """What a user wrote cannot be run; the message names the key, the value and the way out."""


def divisors(number: int) -> list[int]:
    """The divisors of `number`, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


@dataclass_transform(frozen_default=True, kw_only_default=True)
def frozen(cls: Class) -> Class:
    """A dataclass of the tree: immutable, keyword-only, strict about types and unknown keys."""
    return dataclass(frozen=True, kw_only=True, config=STRICT)(cls)


def probability(name: str, value: float) -> None:
    """Refuse a `value` outside [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is not a probability below 1; allowed: 0 <= {name} < 1")


def at_least(minimum: float, **values: float | None) -> None:
    """Refuse every one of `values` that lies below `minimum`; None is allowed."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"{name}={value} is too small; it must be at least {minimum}")


def positive(**values: float) -> None:
    """Refuse every one of `values` that is not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name}={value} must be greater than 0")


@frozen
class DebertaConfig:
    """The architecture (SPEC sections 1 to 4 of the original's behaviour; sizes of the papers' tables).

    The defaults are DeBERTa-v2's layout: log buckets, position projections shared with the content's,
    a normalised relative table, absolute positions only in the enhanced mask decoder.
    """

    vocab_size: int
    """Rows of the word table, spare ids included."""
    hidden_size: int = 768
    """Width of the residual stream (H)."""
    num_layers: int = 12
    """Encoder layers (N). The last one is applied twice by the enhanced mask decoder."""
    num_heads: int = 12
    """Attention heads."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_heads when unset."""
    intermediate_size: int = 3072
    """Inner width of the feed-forward block."""
    embedding_size: int | None = None
    """Width of the embedding tables; hidden_size when unset, otherwise projected to it."""
    max_position_embeddings: int = 512
    """Rows of the absolute-position table: the longest sequence."""
    max_relative_positions: int | None = None
    """Farthest distance told apart; max_position_embeddings when unset."""
    position_buckets: int = 256
    """Logarithmic buckets on each side of the relative table (k); 0 gives every distance its own row (v1)."""
    pos_att_type: Literal["c2p", "c2p|p2c"] = "c2p|p2c"
    """Position terms of eq. (4): content-to-position, and position-to-content."""
    share_att_key: bool = True
    """Project the relative table with the content's query and key projections (v2, v3) instead of its own (v1)."""
    normalize_relative_table: bool = True
    """LayerNorm on the relative table (v2, v3)."""
    position_biased_input: bool = False
    """Add absolute positions to the input, as BERT does; there is no enhanced mask decoder then."""
    type_vocab_size: int = 0
    """Rows of the token-type table; 0 leaves it out."""
    conv_kernel_size: int = 0
    """Width (odd) of the n-gram convolution beside the first layer; 0 leaves it out."""
    conv_groups: int = 1
    """Groups of the n-gram convolution."""
    conv_act: Activation = "gelu"
    """Activation after the n-gram convolution."""
    hidden_act: Activation = "gelu"
    """Activation of the feed-forward block and of the head; gelu is the exact, erf form."""
    hidden_dropout: float = 0.1
    """Dropout on embeddings, the relative table and every sublayer's output."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    layer_norm_eps: float = 1e-7
    """Added to the variance inside every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""

    def __post_init__(self) -> None:
        at_least(1, hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads)
        at_least(1, intermediate_size=self.intermediate_size, vocab_size=self.vocab_size)
        at_least(1, head_dim=self.head_dim, embedding_size=self.embedding_size)
        at_least(2, max_position_embeddings=self.max_position_embeddings)
        at_least(2, max_relative_positions=self.max_relative_positions)
        at_least(0, position_buckets=self.position_buckets, type_vocab_size=self.type_vocab_size)
        probability("hidden_dropout", self.hidden_dropout)
        probability("attention_dropout", self.attention_dropout)
        # A row of zeros (padding) would be NaN after a LayerNorm without epsilon.
        positive(layer_norm_eps=self.layer_norm_eps, initializer_range=self.initializer_range)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                f"choose one of {divisors(self.hidden_size)} or set head_dim"
            )
        if self.conv_kernel_size < 0 or (self.conv_kernel_size and self.conv_kernel_size % 2 == 0):
            raise ConfigError(f"conv_kernel_size={self.conv_kernel_size} must be odd, or 0 for no convolution")
        if self.conv_groups < 1 or self.hidden_size % self.conv_groups:
            raise ConfigError(f"conv_groups={self.conv_groups} does not divide hidden_size={self.hidden_size}")
        if self.num_layers < 2 and not self.position_biased_input:
            raise ConfigError(
                f"num_layers={self.num_layers}: the enhanced mask decoder reads the layer before the last"
            )
        if self.position_buckets and not 2 <= self.position_buckets < 2 * self.relative_reach:
            raise ConfigError(
                f"position_buckets={self.position_buckets} must lie in 2 … {2 * self.relative_reach - 1} "
                f"(below twice max_relative_positions={self.relative_reach}), or be 0 for no buckets"
            )

    @property
    def head_size(self) -> int:
        """Width of one head (d of the scale 1/sqrt(3d))."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size

    @property
    def embedding_width(self) -> int:
        """Width of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def relative_reach(self) -> int:
        """Farthest distance told apart, plus one (M of eq. 3's clamp)."""
        return self.max_relative_positions or self.max_position_embeddings

    @property
    def relative_span(self) -> int:
        """Rows of the relative table on each side (k of eq. 3)."""
        return self.position_buckets or self.relative_reach

    @property
    def has_position_to_content(self) -> bool:
        """Whether the third term of eq. (4) is used."""
        return "p2c" in self.pos_att_type


@frozen
class ModelSection(DebertaConfig):
    """`model`: the architecture, and the length at which it is run."""

    vocab_size: int | None = None
    """Taken from the data's tokenizer when unset; if set, never smaller than it."""
    sequence_length: int = 512
    """Tokens in a row of a batch, [CLS] and [SEP] included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.sequence_length <= self.max_position_embeddings:
            raise ConfigError(
                f"sequence_length={self.sequence_length} does not fit the position table: choose 8 … "
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

    folder: str = "runs/default"
    """Configuration, metrics, TensorBoard files, checkpoints. The same command in the same folder resumes."""


@frozen
class DataSection:
    """`data`: what is read and how it is masked."""

    train: str | None = None
    """Prefix of the training dataset (PREFIX.bin, PREFIX.idx, PREFIX.manifest.json, PREFIX.tokenizer/)."""
    valid: str | None = None
    """Prefix of the held-out dataset; none when unset."""
    attend_across_documents: bool = False
    """Let attention, convolution and positions run across the documents of a packed row, as the original did."""
    masking: Literal["unbiased", "original"] = "unbiased"
    """`original` reproduces the first release, whose masks thin out at the end of each row (SPEC section 5)."""
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
    init: str | None = None
    """Checkpoint whose weights to start from (a run, step or weights folder); fresh weights when unset."""
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
    """False is the original's form (SPEC section 7), to continue released weights as they were trained."""

    def __post_init__(self) -> None:
        at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
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
    """Learning rate at the last step, as a share of the peak."""

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
    """Rows of the held-out dataset to use; 0 uses all."""

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, max_samples=self.max_samples)


@frozen
class RunConfig:
    """Everything that defines a pretraining run, save the engine's own matters."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        if self.schedule.warmup_steps > self.train.steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is longer than train.steps={self.train.steps}; "
                f"set schedule.warmup_steps to {self.train.steps} or less"
            )
