"""What the objectives of pretraining have to choose, a section for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import FLOAT32_ROOM, at_least, at_most, frozen, positive
from deberta_xl.settings.architecture import DebertaConfig

Sharing = Literal["gdes", "es", "none"]
"""What of its generator's tables a discriminator reads."""


@frozen
class GeneratorSection:
    """`generator`: the smaller model that proposes tokens to `replaced_tokens` (arXiv 2111.09543). What is unset is as
    in `model`, which is the discriminator."""

    num_layers: int | None = None
    """Encoder layers; half of the discriminator's when unset, and at least 2."""
    hidden_size: int | None = None
    """Width of the residual stream. With shared embeddings it is the discriminator's."""
    num_heads: int | None = None
    """Attention heads; when only hidden_size is set, as many as keep the size of a head."""
    intermediate_size: int | None = None
    """Inner width of the feed-forward block; when only hidden_size is set, in proportion to it."""
    learning_rate: float | None = None
    """Peak of the generator's schedule; optimizer.learning_rate when unset."""

    def __post_init__(self) -> None:
        at_least(1, num_layers=self.num_layers, hidden_size=self.hidden_size, num_heads=self.num_heads)
        at_least(1, intermediate_size=self.intermediate_size)
        at_least(0, learning_rate=self.learning_rate)
        at_most(FLOAT32_ROOM, learning_rate=self.learning_rate)


@frozen
class ReplacedTokensSection:
    """`replaced_tokens`: how generator and discriminator learn together."""

    sharing: Sharing = "gdes"
    """What of the generator's tables the discriminator reads: `gdes` the tables as they are, without sending gradients
    back, plus what it learns to add to them; `es` the tables themselves, to which both send gradients; `none` its own.
    """
    weight: float = 50.0
    """Weight of the discriminator's loss (the paper's λ; 10 in the original's scripts)."""
    temperature: float = 1.0
    """Of the generator's distribution when tokens are drawn from it; below 1 makes replacements more plausible."""
    training: Literal["decoupled", "joint"] = "decoupled"
    """`decoupled` updates the generator first, then the discriminator on what was drawn, each with its own gradient
    norm; `joint` makes one update of both from the sum of their losses."""

    def __post_init__(self) -> None:
        positive(weight=self.weight, temperature=self.temperature)
        if self.sharing == "es" and self.training == "decoupled":
            raise ConfigError(
                "sharing='es' lets both models send gradients to one table, which is one update: set "
                "replaced_tokens.training=joint with it, or replaced_tokens.sharing=gdes"
            )


def generator_architecture(discriminator: DebertaConfig, section: GeneratorSection) -> DebertaConfig:
    """The generator beside a discriminator of this architecture. Raises ConfigError where it cannot be."""
    hidden = section.hidden_size or discriminator.hidden_size
    changed = {
        "num_layers": section.num_layers or max(2, discriminator.num_layers // 2),
        "hidden_size": hidden,
        "num_heads": section.num_heads or scaled("num_heads", discriminator, hidden),
        "intermediate_size": section.intermediate_size or scaled("intermediate_size", discriminator, hidden),
    }
    if hidden != discriminator.hidden_size and not discriminator.position_biased_input:
        changed["embedding_size"] = None
    try:
        return dataclasses.replace(discriminator, **changed)
    except ConfigError as error:
        key = str(error).partition("=")[0]
        is_own = key in {f.name for f in dataclasses.fields(section)}
        raise ConfigError(f"generator{'.' if is_own else ': '}{error}") from None


def scaled(name: str, discriminator: DebertaConfig, hidden: int) -> int:
    """A size of the discriminator's in proportion to another hidden size. Raises ConfigError where it is no number."""
    size, rest = divmod(getattr(discriminator, name) * hidden, discriminator.hidden_size)
    if rest:
        raise ConfigError(
            f"generator.hidden_size={hidden} beside model.hidden_size={discriminator.hidden_size}: "
            f"model.{name}={getattr(discriminator, name)} cannot be scaled to it; set generator.{name}"
        )
    return size


def check_generator(
    discriminator: DebertaConfig, section: GeneratorSection, sharing: str, learning_rate: float
) -> None:
    """Refuse a generator that cannot be, or that shares tables of another width, or learns beside `learning_rate` 0.

    Raises ConfigError.
    """
    if section.learning_rate and not learning_rate:
        raise ConfigError(
            f"generator.learning_rate={section.learning_rate} is a share of optimizer.learning_rate, which is 0: set "
            "that above 0"
        )
    generator = generator_architecture(discriminator, section)
    own, other = discriminator.embedding_width, generator.embedding_width
    if sharing != "none" and own != other:
        raise ConfigError(
            f"replaced_tokens.sharing={sharing}, but the generator's tables are {other} wide and the discriminator's "
            f"{own}: leave generator.hidden_size unset (make it smaller by generator.num_layers), or set "
            "replaced_tokens.sharing=none"
        )


@frozen
class AutoregressiveSection:
    """`autoregressive`: what `mixed` draws."""

    share: float = 0.5
    """Share of the micro-batches that are autoregressive; in the others masked tokens are predicted."""
    form: Literal["causal", "prefix"] = "causal"
    """Whether all tokens of those see only what came before them, or a prefix is seen from everywhere."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"share={self.share} must lie between 0 and 1: at either end it is train.objective=masked_lm, or "
                "causal or prefix"
            )


READERS = {
    "generator": ("replaced_tokens",),
    "replaced_tokens": ("replaced_tokens",),
    "autoregressive": ("mixed",),
}
"""Section -> the built-in objectives that read it."""


def check_read(objective: str, sections: Mapping[str, object]) -> None:
    """Refuse a section that has been written to and that the objective does not read; a user's own may read any.

    Raises ConfigError.
    """
    for name, section in sections.items():
        if ":" in objective or objective in READERS[name] or section == type(section)():
            continue
        wrong = next(f.name for f in dataclasses.fields(section) if getattr(section, f.name) != f.default)
        raise ConfigError(
            f"{name}.{wrong}={getattr(section, wrong)} is set, but train.objective={objective} does not read it: set "
            f"train.objective={' or '.join(READERS[name])}, or leave {name}.{wrong} out"
        )
