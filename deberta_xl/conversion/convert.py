"""Conversion of a pretrained model between our own, the original release's and Hugging Face's layout.

Tensors are read, changed and written one at a time, so the memory needed is that of the largest tensor or two, not the
model's. The destination appears whole, verified where asked for, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from deberta_xl.base.durable import below, write_files
from deberta_xl.base.log import logger
from deberta_xl.base.progress import progress
from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.destination import refuse_existing, whole_or_nothing
from deberta_xl.checkpoint.lazy import LazyTensors, in_type
from deberta_xl.checkpoint.manifest import STATE_NAME, CheckpointError
from deberta_xl.checkpoint.tensor_writer import (
    DEFAULT_SHARD_BYTES,
    Advance,
    most_common_type,
    total_bytes,
    write_pickle,
    write_shards,
)
from deberta_xl.conversion.card_metadata import CardMetadata
from deberta_xl.conversion.edits import Edits, apply_edits, average_of_newest
from deberta_xl.conversion.expressible import check_expressible, check_expressible_in_the_original, warn_of_decoder
from deberta_xl.conversion.model_card import model_card
from deberta_xl.conversion.tokenizer_export import json_bytes, tokenizer_files
from deberta_xl.conversion.verify import verify
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE, unread_files
from deberta_xl.weights.dialect import Dialect, can_be_fused, write_dialect
from deberta_xl.weights.foreign import is_foreign_folder, open_foreign, read_config_fields, stated_length
from deberta_xl.weights.foreign_config import to_huggingface_config, to_microsoft_config
from deberta_xl.weights.foreign_fields import other_fields
from deberta_xl.weights.native import CONFIG_NAME, TOKENIZER_NAME, find_weights_folder, open_native, write_native
from deberta_xl.weights.native_config import native_config
from deberta_xl.weights.pretrained_folder import ORIGIN_NAME, Kind, Pretrained, describe_fresh


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

    Raises CheckpointError when the source is damaged, unsafe or cannot be expressed there, when `destination` exists
    and is not empty, or when it differs from the source by more than the tolerance; TokenizerError when the tokenizer
    cannot be expressed. Nothing is left at the destination then.
    """
    refuse_existing(destination)
    refuse_contradictions(conversion)
    model = open_source(source, conversion)
    model = apply_edits(model, conversion.edits)
    typed = replace(model, tensors=in_type(model.tensors, conversion.dtype))
    writers = {"native": write_native_layout, "huggingface": write_huggingface, "microsoft": write_microsoft}
    size = total_bytes(typed.tensors)
    with whole_or_nothing(destination, size) as partial:
        with progress(f"writing {destination.name}", size) as advance:
            writers[conversion.to](partial, typed, conversion, advance)
        if conversion.tolerance is not None:
            written = open_pretrained(partial, may_be_fresh=True)
            verify(model, written, conversion.tolerance, conversion.show)


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


def open_source(source: Path, conversion: Conversion) -> Pretrained:
    """The source of a conversion, checked against what it is said to be."""
    found = detect(source)
    # The original's own releases on the Hub carry Hugging Face's model_type.
    is_hub_release = (conversion.source_kind, found) == ("microsoft", "huggingface")
    if conversion.source_kind not in (None, found) and not is_hub_release:
        raise CheckpointError(f"--from {conversion.source_kind}: {source} is in the {found} layout; leave --from out")
    if conversion.generator is not None and found == "native":
        raise CheckpointError("--generator: only a v3 discriminator of the original release needs it; leave it out")
    if conversion.edits.average is not None:
        if found != "native":
            raise CheckpointError(f"--average: {source} is no run folder, which has several checkpoints")
        return average_of_newest(source, conversion.edits.average)
    model = open_pretrained(source, generator=conversion.generator, may_be_fresh=True)
    if model.fresh and not (found == "native" and model.origin):  # otherwise it was said when they were made
        logger.warning("%s lacks %s", source, describe_fresh(model.fresh))
    return model


# Out


def write_native_layout(partial: Path, model: Pretrained, conversion: Conversion, advance: Advance) -> None:
    """A weights folder of ours."""
    files = {CONFIG_NAME: json_bytes(native_config(model.config))}
    if model.origin is not None:
        files[ORIGIN_NAME] = model.origin.to_json()
    tokenizer = load_tokenizer(model)
    contents = tokenizer.files() if tokenizer is not None else plain_files(model)
    files |= below(TOKENIZER_NAME, contents)
    shard_bytes = conversion.shard_bytes or DEFAULT_SHARD_BYTES
    # A release gets what it lacks, so that pretraining can go on from it; a task's model of ours stays what it is.
    tensors = not_fresh(model) if model.kind == "native" and model.origin is None else model.tensors
    write_native(partial, tensors, files, shard_bytes=shard_bytes, advance=advance)


def write_huggingface(partial: Path, model: Pretrained, conversion: Conversion, advance: Advance) -> None:
    """A folder that transformers loads with AutoModel, AutoTokenizer and AutoModelForMaskedLM."""
    check_expressible(model.config)
    warn_of_decoder(model.config)
    dialect = choose_dialect(model)
    fields = to_huggingface_config(model.config, is_fused=dialect.is_fused, is_legacy=dialect.is_legacy)
    fields |= other_fields(model.origin.fields) if model.origin else {}
    tensors = write_dialect(not_fresh(model), model.config, dialect)
    fields["dtype"] = str(most_common_type(tensors)).removeprefix("torch.")
    files = {CONFIG_NAME: json_bytes(fields)}
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        files |= tokenizer_files(tokenizer, max_length=trained_length(model))
    else:
        files |= plain_files(model)
    if conversion.with_card:
        files["README.md"] = model_card(model, tokenizer, conversion.metadata).encode()
    write_files(partial, files)
    write_shards(partial, tensors, shard_bytes=conversion.shard_bytes or DEFAULT_SHARD_BYTES, advance=advance)


def write_microsoft(partial: Path, model: Pretrained, _conversion: Conversion, advance: Advance) -> None:
    """A folder for the original code: `model_config.json`, `pytorch_model.bin`, `spm.model`."""
    check_expressible_in_the_original(model.config)
    dialect = choose_dialect(model)._replace(prefix="deberta.", is_legacy=False)
    # The original takes v1's fused projections apart only together with those of position-to-content.
    dialect = dialect._replace(is_fused=dialect.is_fused and model.config.has_position_to_content)
    fields = to_microsoft_config(model.config) | (other_fields(model.origin.fields) if model.origin else {})
    tokenizer = load_tokenizer(model)
    if tokenizer is not None and not tokenizer.rules.is_plain:
        raise CheckpointError(
            f"--to microsoft: the tokenizer {tokenizer.rules.describe()}; the original code has only {MODEL_FILE}, and "
            "would give other ids"
        )
    files = {MODEL_FILE: tokenizer.spm_model} if tokenizer is not None else plain_files(model)
    write_files(partial, {"model_config.json": json_bytes(fields), **files})
    write_pickle(partial / "pytorch_model.bin", write_dialect(not_fresh(model), model.config, dialect), advance)


def not_fresh(model: Pretrained) -> LazyTensors:
    """The tensors that the source had: what was made up on the way in stays behind on the way out."""
    return {name: tensor for name, tensor in model.tensors.items() if name not in model.fresh}


def choose_dialect(model: Pretrained) -> Dialect:
    """How the tensors are spelt: as they came, or as the v2 release does (v1's way for a model that v1 can hold)."""
    if model.origin is None:
        return Dialect(is_fused=can_be_fused(model.tensors, model.config))
    came = model.origin.dialect
    return came._replace(prefix="deberta." if came.prefix == "bert." else came.prefix)


def trained_length(model: Pretrained) -> int:
    """The longest sequence that a model was trained on, as far as is recorded; the longest it takes otherwise."""
    path = model.folder / STATE_NAME
    prints = read_json(path).get("fingerprints", {}) if path.is_file() else {}
    recorded = stated_length(model.folder) if model.kind == "huggingface" else prints.get("sequence_length")
    return recorded or model.config.max_position_embeddings


# The tokenizer


def load_tokenizer(model: Pretrained) -> Tokenizer | None:
    """The model's tokenizer; None, with a WARNING, where there is none of SentencePiece's."""
    folder = model.tokenizer
    if folder is None:
        logger.warning("%s has no tokenizer; the converted folder will have none", model.folder)
        return None
    tokenizer = model.read_tokenizer()
    if tokenizer is None:
        logger.warning("%s: the tokenizer has no %s; its files are copied as they are", folder, MODEL_FILE)
    elif tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{folder} has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}: they do not belong "
            "together"
        )
    return tokenizer


def plain_files(model: Pretrained) -> dict[str, bytes]:
    """The files of a tokenizer that is not SentencePiece's (v1's), unread."""
    return unread_files(model.tokenizer) if model.tokenizer is not None else {}
