"""Conversion of a pretrained model between our own, the original release's and Hugging Face's layout.

Tensors are read, changed and written one at a time, so the memory needed is that of the largest tensor or two, not the
model's. The destination appears whole, verified where asked for, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from deberta_xl.base.log import logger
from deberta_xl.base.progress import progress
from deberta_xl.checkpoint.destination import refuse_existing, whole_or_nothing
from deberta_xl.checkpoint.lazy import in_type
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.tensor_writer import DEFAULT_SHARD_BYTES, total_bytes
from deberta_xl.conversion.card_metadata import CardMetadata
from deberta_xl.conversion.edits import Edits, apply_edits, average_of_newest
from deberta_xl.conversion.layouts import Writing, write_huggingface, write_microsoft, write_native_layout
from deberta_xl.conversion.verify import verify
from deberta_xl.weights.foreign import is_foreign_folder, open_foreign, read_config_fields
from deberta_xl.weights.names import DETECTOR
from deberta_xl.weights.native import find_weights_folder, open_native
from deberta_xl.weights.pair import PARTS, split_part
from deberta_xl.weights.pair_folder import Pair, open_pair
from deberta_xl.weights.pretrained_folder import Kind, Pretrained, describe_fresh


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is asked for."""

    to: Kind
    """Layout of the destination."""
    source_kind: Kind | None = None
    """Layout of the source; found out when absent."""
    dtype: torch.dtype | None = None
    """Type of the weights; as they are stored when absent."""
    edits: Edits = field(default_factory=Edits)
    shard_bytes: int | None = None
    """Size of the largest file of weights."""
    generator: Path | None = None
    """The generator of a v3 discriminator that has only deltas."""
    with_card: bool = False
    """Write README.md."""
    metadata: CardMetadata = field(default_factory=CardMetadata)
    """What README.md states besides what is recorded."""
    tolerance: float | None = None
    """Compare the destination with the source, and refuse it beyond this difference; None leaves that out."""
    show: Callable[[str], None] = logger.info
    """Is given the lines of the comparison."""


def convert(source: Path, destination: Path, conversion: Conversion) -> None:
    """Write the model `source` (a folder, or a file of weights with its configuration beside it) to `destination`.

    Of a folder with a discriminator and its generator both are, unless `source` names one (`FOLDER/generator`).

    Raises CheckpointError when the source is damaged, unsafe or cannot be expressed there, when `destination` exists
    and is not empty, or when it differs from the source by more than the tolerance; TokenizerError when the tokenizer
    cannot be expressed. Nothing is left at the destination then.
    """
    refuse_existing(destination)
    refuse_contradictions(conversion)
    model = edited(open_source(source, conversion), conversion.edits)
    typed = for_each(model, lambda one: replace(one, tensors=in_type(one.tensors, conversion.dtype)))
    writers = {"native": write_native_layout, "huggingface": write_huggingface, "microsoft": write_microsoft}
    size = sum(total_bytes(one.tensors) for one in models_of(typed))
    with whole_or_nothing(destination, size) as partial:
        with progress(f"writing {destination.name}", size) as advance:
            card = conversion.metadata if conversion.with_card else None
            shard_bytes = conversion.shard_bytes or DEFAULT_SHARD_BYTES
            writers[conversion.to](partial, typed, Writing(shard_bytes=shard_bytes, card=card, advance=advance))
        if conversion.tolerance is not None:
            written = open_any(partial) if isinstance(model, Pair) else open_pretrained(partial, may_be_fresh=True)
            for before, after in zip(models_of(model), models_of(written), strict=True):
                verify(before, after, conversion.tolerance, conversion.show)


def models_of(source: Pretrained | Pair) -> list[Pretrained]:
    """The one model, or the two."""
    return [source.discriminator, source.generator] if isinstance(source, Pair) else [source]


def for_each(source: Pretrained | Pair, change: Callable[[Pretrained], Pretrained]) -> Pretrained | Pair:
    """The same with every model changed."""
    if isinstance(source, Pair):
        return Pair(change(source.discriminator), change(source.generator), source.sharing)
    return change(source)


def edited(source: Pretrained | Pair, edits: Edits) -> Pretrained | Pair:
    """The source with what is to be changed."""
    if isinstance(source, Pair) and edits.num_layers is not None:
        raise CheckpointError(
            f"--num_layers {edits.num_layers}: {source.discriminator.folder} holds a discriminator and its generator, "
            "which have numbers of layers of their own; give one of them, as SOURCE/discriminator or SOURCE/generator"
        )
    return for_each(source, lambda model: apply_edits(model, edits))


def refuse_contradictions(conversion: Conversion) -> None:
    """Raise CheckpointError for options that the destination has no use for."""
    if conversion.to == "microsoft" and conversion.shard_bytes is not None:
        raise CheckpointError(
            "--max_shard_size: the original release's layout has one file, pytorch_model.bin; leave the option out"
        )
    if conversion.with_card and conversion.to != "huggingface":
        raise CheckpointError(f"--model_card, --card: only a Hugging Face folder has a card, not --to {conversion.to}")


# In


def detect(source: Path) -> Kind:
    """The layout of a source. Raises CheckpointError when it is none."""
    source, _ = split_part(source)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and not is_foreign_folder(folder):
        return "native"
    fields = read_config_fields(folder) or {}
    if source.is_file() and fields and not is_foreign_folder(folder):
        raise CheckpointError(f"{source} is part of a native folder; give the folder, {folder}")
    return "huggingface" if fields.get("model_type") else "microsoft"


def open_pretrained(source: Path, *, generator: Path | None = None, may_be_fresh: bool = False) -> Pretrained:
    """The model in a folder (or foreign file) of any layout, to be read tensor by tensor."""
    if detect(source) == "native":
        return open_native(find_weights_folder(source), may_be_fresh=may_be_fresh)
    return open_foreign(source, generator=generator, may_be_fresh=may_be_fresh)


def open_any(source: Path, generator: Path | None = None) -> Pretrained | Pair:
    """The model, or the discriminator and its generator, in a folder (or foreign file) of any layout."""
    found = find_weights_folder(source) if detect(source) == "native" else source
    return open_pair(found, generator=generator) or open_pretrained(source, generator=generator, may_be_fresh=True)


def open_source(source: Path, conversion: Conversion) -> Pretrained | Pair:
    """The source of a conversion, checked against what it is said to be."""
    found = detect(source)
    # The original's own releases on the Hub carry Hugging Face's model_type.
    is_hub_release = (conversion.source_kind, found) == ("microsoft", "huggingface")
    if conversion.source_kind not in (None, found) and not is_hub_release:
        raise CheckpointError(f"--from {conversion.source_kind}: {source} is in the {found} layout; leave --from out")
    if conversion.generator is not None and found == "native":
        raise CheckpointError("--generator: only a v3 discriminator of the original release needs it; leave it out")
    if (count := conversion.edits.average) is not None:
        if found != "native":
            raise CheckpointError(f"--average: {source} is no run folder, which has several checkpoints")
        if isinstance(pair := open_any(source), Pair):
            return Pair(*(average_of_newest(source / part, count) for part in PARTS), pair.sharing).summed_anew()
        return average_of_newest(source, count)
    model = open_any(source, conversion.generator)
    for one in models_of(model):
        # What was made on the way in was said then, and a discriminator beside its generator needs no head.
        lacking = [name for name in one.fresh if not (isinstance(model, Pair) and DETECTOR in one.tensors)]
        if lacking and not (found == "native" and one.origin):
            logger.warning("%s lacks %s", source, describe_fresh(lacking))
    return model
