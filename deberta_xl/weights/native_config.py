"""Our own `config.json`: the architecture beside native weights, and what else has to be known to read them.

{"model_type": "deberta_xl", "vocab_size": …, …}                            a model
{…, "sequence_length": 512}                                                 … and how long the rows of its training were
{…, "objective": "causal"}                                                  one that has learnt to write on
{…, "objective": "mixed", "form": "prefix"}                                 one that fills masks, too
{…, "generator": {"vocab_size": …, …}, "sharing": "gdes"}                   a discriminator with its generator
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import ValidationError

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import Sharing

MODEL_TYPE = "deberta_xl"
WritingObjective = Literal["causal", "prefix", "mixed"]
"""Objectives whose models have learnt to predict the next token."""
Form = Literal["causal", "prefix"]
"""Whether its tokens see of a beginning what came before them, or all of it (`autoregressive.form`)."""


class Learnt(NamedTuple):
    """What a model was trained for, and on how long rows: what those who use it have to know of that."""

    objective: WritingObjective | None = None
    """What it was trained for, where that is not to fill masks or to find replaced tokens."""
    form: Form | None = None
    """Of the autoregressive part of a mixed objective."""
    sequence_length: int | None = None
    """Tokens of a row in training, [CLS] and [SEP] among them, in the last phase of several; None where it is not
    recorded."""

    @property
    def writes_as(self) -> Form | None:
        """How it writes on; None for a model that has not learnt to."""
        return (self.form or "causal") if self.objective == "mixed" else self.objective

    @classmethod
    def checked(cls, objective: Any, form: Any, sequence_length: Any) -> Learnt:
        """From what a configuration says. Raises ConfigError for a value that is not known, or out of place."""
        for name, value, type_of in (("objective", objective, WritingObjective), ("form", form, Form)):
            if value is not None and value not in get_args(type_of):
                raise ConfigError(f"{name}={value!r} is not known; known: {', '.join(get_args(type_of))}")
        if form is not None and objective != "mixed":
            raise ConfigError(f"form={form!r} belongs to objective='mixed' alone, and objective is {objective!r}")
        if sequence_length is not None and not (type(sequence_length) is int and sequence_length > 0):
            raise ConfigError(f"sequence_length={sequence_length!r} is no number of tokens; the least is 1")
        return cls(objective, form, sequence_length)


UNRECORDED = Learnt()
"""Of a model of which nothing is known but its weights."""


class NativeConfig(NamedTuple):
    """What a native `config.json` says."""

    architecture: DebertaConfig
    """Of the model; of a pair, the discriminator's."""
    generator: DebertaConfig | None = None
    """Of the generator whose weights are there, too."""
    sharing: Sharing | None = None
    """How the discriminator's tables are stored: beside a generator only."""
    learnt: Learnt = UNRECORDED


def native_config(
    config: DebertaConfig,
    *,
    generator: DebertaConfig | None = None,
    sharing: Sharing | None = None,
    learnt: Learnt = UNRECORDED,
) -> dict[str, object]:
    """Contents of a native `config.json`. Were it `deberta-v2`, transformers would load it and keep no weight."""
    assert (generator is None) == (sharing is None), "a pair of models, or one"
    more: dict[str, object] = {"sharing": sharing, **learnt._asdict()}
    more["generator"] = dataclasses.asdict(generator) if generator else None
    given = {key: value for key, value in more.items() if value is not None}
    return {"model_type": MODEL_TYPE, **dataclasses.asdict(config), **given}


def read_native_config(path: Path) -> NativeConfig:
    """What the native `config.json` in `path` says. Raises CheckpointError when it is none."""
    try:
        fields = read_json(path)
        model_type = fields.pop("model_type", None)
        if model_type != MODEL_TYPE:
            raise CheckpointError(f"{path} has model_type {model_type!r}, not {MODEL_TYPE!r}: no configuration of ours")
        return parse(fields)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: without it the weights' architecture is not known") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a configuration of a {MODEL_TYPE} model: {explain(error)}") from error


def parse(fields: dict[str, Any]) -> NativeConfig:
    """The fields, strictly. Raises ConfigError for a value that is not known, and for half a pair."""
    generator, sharing = fields.pop("generator", None), fields.pop("sharing", None)
    learnt = Learnt.checked(*(fields.pop(name, None) for name in Learnt._fields))
    if sharing is not None and sharing not in get_args(Sharing):
        raise ConfigError(f"sharing={sharing!r} is not known; known: {', '.join(get_args(Sharing))}")
    if generator is not None and not isinstance(generator, Mapping):
        raise ConfigError(f"generator={generator!r} is no architecture")
    if (generator is None) != (sharing is None):
        raise ConfigError(
            "generator and sharing go together: the architecture of the generator whose weights are in this folder, "
            "and how the discriminator shares its tables"
        )
    partner = None if generator is None else DebertaConfig(**generator)
    return NativeConfig(DebertaConfig(**fields), partner, sharing, learnt)


def explain(error: Exception) -> str:
    """The first thing that is wrong with a configuration, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    finding = error.errors()[0]
    cause = finding.get("ctx", {}).get("error")
    return str(cause or f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}")
