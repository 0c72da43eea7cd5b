"""A pretrained model on disk, whoever wrote it: configuration, weights under our names, tokenizer, origin."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.lazy import LazyTensors, constant, in_memory
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.tensor_files import complain_about_names
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE, SETTINGS_FILE
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.dialect import Dialect
from deberta_xl.weights.names import DETECTOR, is_beside_the_model
from deberta_xl.weights.native_config import UNRECORDED, Learnt
from deberta_xl.weights.pair import split_part

Kind = Literal["native", "huggingface", "microsoft"]
ORIGIN_NAME = "conversion.json"
TRUNK = ("embeddings.", "encoder.")
"""How the names of the parameters begin that every model has."""
REPLACEABLE = ("embeddings.position.", "head.", "decoder.")
"""Groups of parameters that a release may lack as a whole: transformers drops what only EMD reads, absolute positions
and layers of its own, and a task's model has no masked-LM head."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a conversion keeps of its source, so that the way back gives the same files; `conversion.json`."""

    source: str
    kind: Kind
    dialect: Dialect
    fields: dict[str, Any] = field(default_factory=dict)
    """Of its configuration, what says nothing of the architecture."""
    fresh: tuple[str, ...] = ()
    """Parameters of ours that the source does not have; they are not written on the way back."""

    def to_json(self) -> bytes:
        """Contents of `conversion.json`."""
        facts = vars(self) | {"dialect": self.dialect._asdict(), "fresh": list(self.fresh)}
        return (json.dumps(facts, indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Origin | None:
        """From `conversion.json`; None when there is none. Raises CheckpointError when it is something else."""
        if not path.is_file():
            return None
        try:
            facts = read_json(path)
            return cls(**facts | {"dialect": Dialect(**facts["dialect"]), "fresh": tuple(facts["fresh"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}; delete it if its origin does not matter") from None


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model that can be read tensor by tensor."""

    folder: Path
    kind: Kind
    config: DebertaConfig
    tensors: LazyTensors
    """Every parameter of the masked-LM model, in the model's order, then other heads, and riders behind "extra."."""
    tokenizer: Path | None = None
    """The folder with its tokenizer's files."""
    origin: Origin | None = None
    fresh: tuple[str, ...] = ()
    """Parameters that were made up, since the model they come from has none."""
    learnt: Learnt = UNRECORDED

    def read_tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, where it has one of SentencePiece's. Raises TokenizerError as `Tokenizer.load`."""
        if self.tokenizer is None or not (self.tokenizer / MODEL_FILE).is_file():
            return None
        has_settings = (self.tokenizer / SETTINGS_FILE).is_file()
        return Tokenizer.load(self.tokenizer, None if has_settings else self.config.vocab_size)


def complete(
    tensors: LazyTensors, config: DebertaConfig, path: Path, *, may_be_fresh: bool, takes_any_head: bool = False
) -> tuple[LazyTensors, tuple[str, ...]]:
    """The tensors in the model's order, checked against its parameters; and the names of those made fresh.

    With `may_be_fresh`, absent absolute positions become zeros, an absent head or decoder is initialised;
    with `takes_any_head`, what is not the trunk's may be another objective's.
    Raises CheckpointError naming tensors that are missing, too many, or of another shape.
    """
    if DETECTOR in tensors and not may_be_fresh:
        raise CheckpointError(no_mask_filler(path))
    check_num_layers(config, tensors, path)
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = [name for name in expected if name not in tensors]
    fresh = fresh_parameters(missing, config, expected, tensors) if may_be_fresh else {}
    if lacking := [name for name in missing if name not in fresh]:
        hint = "" if may_be_fresh else ABSENT_HINT * all(name.startswith(REPLACEABLE) for name in lacking)
        raise complain_about_names(path, lacking, f"{hint}has no tensor for")
    known = {name: (tensors | fresh)[name] for name in expected}
    for name, tensor in known.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, the configuration asks for {list(expected[name])} "
                f"({tensor.place})"
            )
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{path}: {name} has type {tensor.dtype}, which is no weight ({tensor.place})")
    others = {name: tensor for name, tensor in tensors.items() if name not in expected}
    unknown = [name for name in others if not is_beside_the_model(name)]
    if takes_any_head:
        unknown = [name for name in unknown if name.startswith(TRUNK)]
    if unknown:
        raise complain_about_names(path, unknown, "holds tensors that its configuration has no place for")
    return known | others, tuple(fresh)


def no_mask_filler(path: Path) -> str:
    """Why a discriminator fills no mask, and what it is good for."""
    folder, _ = split_part(path)
    return (
        f"{path} is a discriminator, which fills no masks and writes no text: it finds replaced tokens (python "
        f'tools/detect.py {folder} "TEXT") and can be fine-tuned (train.init={folder}). Where its generator is in the '
        f"folder, too, that fills masks: {folder / 'generator'}"
    )


ABSENT_HINT = "is without absolute positions or masked-LM head (tools/convert.py --to native makes fresh ones): it "


def check_num_layers(config: DebertaConfig, tensors: LazyTensors, path: Path) -> None:
    """Refuse a configuration of more layers than there are weights for, before it is built."""
    last = f"encoder.layers.{config.num_layers - 1}."
    if not any(name.startswith(last) for name in tensors):
        raise CheckpointError(f"{path}: {config.num_layers} layers are configured, the weights have fewer")


def fresh_parameters(
    missing: list[str], config: DebertaConfig, shapes: dict[str, tuple[int, ...]], tensors: LazyTensors
) -> LazyTensors:
    """Initial values of those groups of REPLACEABLE that are missing as a whole."""
    dtype = next(iter(tensors.values())).dtype
    groups = [group for group in REPLACEABLE if all(n in missing for n in shapes if n.startswith(group))]
    if any("position" in group for group in groups) and config.position_biased_input:
        groups.remove("embeddings.position.")  # there the encoder reads it
    fresh = {}
    for name in missing:
        if not name.startswith(tuple(groups)) or not groups:
            continue
        if len(shapes[name]) > 1 and not name.startswith("embeddings."):
            # The head's one matrix has always been drawn from 0; matrices of one shape must not be equal.
            seed = 0 if name.startswith("head.") else DropoutKey(0).fold(name).seed
            random = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed))
            values = (random * config.initializer_range).to(dtype)
            fresh |= in_memory({name: values}, "a new model")
        else:
            value = 1.0 if name.endswith("norm.weight") else 0.0
            fresh[name] = constant(value, shapes[name], dtype, f"a new model: {name}")
    return fresh


def spaced_layers(old: int, new: int) -> list[int]:
    """Which of `old` layers make a model of `new`: evenly spaced; the first (convolution) and last (decoder) stay."""
    return [round(number * (old - 1) / max(1, new - 1)) for number in range(new)]


def with_layers_kept(tensors: LazyTensors, kept: list[int]) -> LazyTensors:
    """The tensors of a model of these layers alone, in this order."""
    chosen: LazyTensors = {}
    for name, tensor in tensors.items():
        beginning, found, rest = name.partition("encoder.layers.")
        if beginning or not found:
            chosen[name] = tensor
            continue
        number, _, parameter = rest.partition(".")
        if int(number) in kept:
            chosen[f"encoder.layers.{kept.index(int(number))}.{parameter}"] = tensor
    return chosen


def describe_fresh(names: Iterable[str]) -> str:
    """What a set of fresh parameters is, in words."""
    words = {
        "embeddings.position.": "absolute positions (zeros instead)",
        "head.": "a masked-LM head (a new one instead)",
        "decoder.": "layers of the decoder's own (new ones instead)",
    }
    return " and ".join(words[group] for group in REPLACEABLE if any(name.startswith(group) for name in names))
