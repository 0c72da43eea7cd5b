"""Folders with a discriminator and its generator, of any layout.

| layout | the discriminator | its generator |
|---|---|---|
| native | `model.safetensors` or rank files: "discriminator.…" | the same files: "generator.…" |
| huggingface | the folder | the folder `generator` in it |
| microsoft | `pytorch_model.bin` | `pytorch_model.generator.bin`, `generator_config.json` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from deberta_xl.checkpoint.lazy import LazyTensors, derived
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.objectives import Sharing
from deberta_xl.weights.foreign import find_generator, is_foreign_folder, open_foreign, read_config_fields
from deberta_xl.weights.native import CONFIG_NAME, open_native
from deberta_xl.weights.native_config import read_native_config
from deberta_xl.weights.pair import TABLES, native_pair, rider_name, split_part, with_part
from deberta_xl.weights.pretrained_folder import Pretrained

SHARING_FIELD = "embedding_sharing"
"""The original's field for how tables are shared."""


class Pair(NamedTuple):
    """A discriminator and its generator."""

    discriminator: Pretrained
    """As a model of its own: with whole tables."""
    generator: Pretrained
    sharing: Sharing

    def tensors(self) -> LazyTensors:
        """Both under native names, without what would be fresh in a discriminator: it needs no masked-LM head."""
        own, partner = not_fresh(self.discriminator), self.generator.tensors
        return native_pair(own, partner, self.discriminator.config, self.sharing)

    def summed_anew(self) -> Pair:
        """The same with whole tables made of the generator's and what is added, once both have been changed: the sum of
        two means is not quite the mean of sums.
        """
        tensors = dict(self.discriminator.tensors)
        for table in TABLES:
            if (delta := tensors.get(rider_name(table))) is not None:
                shared = self.generator.tensors[f"{table}.weight"]
                tensors[f"{table}.weight"] = derived(torch.add, (shared, delta), shared.shape)
        return self._replace(discriminator=replace(self.discriminator, tensors=tensors))


def not_fresh(model: Pretrained) -> LazyTensors:
    """The tensors that the source had: what was made up on the way in stays behind on the way out."""
    return {name: tensor for name, tensor in model.tensors.items() if name not in model.fresh}


def open_pair(source: Path, *, generator: Path | None = None) -> Pair | None:
    """The pair in a folder that has been found; None where it holds, or its path names, one model alone.

    `generator` is the file, or folder, of the generator where it is somewhere else. Raises CheckpointError when one of
    the two is damaged, or they do not belong together.
    """
    folder, part = split_part(source)
    if part is not None:
        return None
    if folder.is_dir() and not is_foreign_folder(folder):
        stated = read_native_config(folder / CONFIG_NAME)
        if stated.generator is None:
            return None
        own, partner = (open_native(with_part(folder, p), may_be_fresh=True) for p in ("discriminator", "generator"))
        return checked(Pair(own, partner, stated.sharing), source)
    beside = find_generator(folder, generator)
    if beside is None:
        return None
    own = open_foreign(folder, generator=generator, may_be_fresh=True)
    partner = open_foreign(beside, may_be_fresh=True)
    fields = read_config_fields(folder if folder.is_dir() else folder.parent) or {}
    sharing = stated_sharing(fields, own, folder)
    return checked(Pair(without_unread_table(own, partner, sharing), partner, sharing), source)


def stated_sharing(fields: Mapping[str, Any], discriminator: Pretrained, path: Path) -> Sharing:
    """How the tables of a foreign pair are shared: what its configuration says, or what its tensors tell."""
    stated = fields.get(SHARING_FIELD)
    if stated is None:
        return "gdes" if rider_name("embeddings.word") in discriminator.tensors else "none"
    if stated not in get_args(Sharing):
        known = ", ".join(get_args(Sharing))
        raise CheckpointError(f"{path}: {SHARING_FIELD}={stated!r} is not known; known: {known}")
    return stated


def without_unread_table(discriminator: Pretrained, generator: Pretrained, sharing: Sharing) -> Pretrained:
    """The discriminator with the generator's absolute positions where it shares tables and does not read these.

    The original has a table, and what is added to it, there as well: of no effect, and not kept.
    """
    if sharing == "none" or discriminator.config.position_biased_input:
        return discriminator
    name, rider = "embeddings.position.weight", rider_name("embeddings.position")
    tensors = {n: t for n, t in discriminator.tensors.items() if n not in (name, rider)}
    if name in generator.tensors:
        tensors[name] = generator.tensors[name]
    fresh = tuple(n for n in discriminator.fresh if n != name or n in generator.fresh)
    return replace(discriminator, tensors=tensors, fresh=fresh)


def checked(pair: Pair, source: Path) -> Pair:
    """The pair. Raises CheckpointError where ids of the one would be other pieces, or no pieces, to the other."""
    own, partner = pair.discriminator, pair.generator
    if own.config.vocab_size != partner.config.vocab_size:
        raise CheckpointError(
            f"{source}: the discriminator has {own.config.vocab_size} ids, the generator {partner.config.vocab_size}: "
            "they do not belong together, since the one judges what the other proposes"
        )
    if own.tokenizer is not None and partner.tokenizer is not None and own.tokenizer != partner.tokenizer:
        ours, theirs = own.read_tokenizer(), partner.read_tokenizer()
        if ours is not None and theirs is not None and not ours.has_same_ids(theirs):
            raise CheckpointError(
                f"{source}: the generator's tokenizer ({partner.tokenizer}) is another than the discriminator's: "
                f"{ours.difference_from(theirs)}; they do not belong together"
            )
    return pair
