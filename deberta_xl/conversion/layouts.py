"""How a model, or a discriminator with its generator, is written in each layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from deberta_xl.base.durable import below, write_files
from deberta_xl.base.log import logger
from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.lazy import LazyTensors, constant
from deberta_xl.checkpoint.manifest import STATE_NAME, CheckpointError
from deberta_xl.checkpoint.tensor_writer import (
    Advance,
    most_common_type,
    no_progress,
    write_pickle,
    write_shards,
)
from deberta_xl.conversion.card_metadata import CardMetadata
from deberta_xl.conversion.expressible import (
    check_expressible,
    check_expressible_in_the_original,
    warn_of_decoder,
    warn_of_mask,
)
from deberta_xl.conversion.model_card import model_card
from deberta_xl.conversion.tokenizer_export import json_bytes, tokenizer_files
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE, unread_files
from deberta_xl.settings.objectives import Sharing
from deberta_xl.weights.dialect import Dialect, can_be_fused, write_dialect
from deberta_xl.weights.foreign import GENERATOR_NAME, stated_length
from deberta_xl.weights.foreign_config import to_huggingface_config, to_microsoft_config
from deberta_xl.weights.foreign_fields import LEARNT, other_fields
from deberta_xl.weights.names import DETECTOR
from deberta_xl.weights.native import CONFIG_NAME, TOKENIZER_NAME, origin_name, write_native
from deberta_xl.weights.native_config import native_config
from deberta_xl.weights.pair import TABLES, rider_name
from deberta_xl.weights.pair_folder import SHARING_FIELD, Pair, not_fresh
from deberta_xl.weights.pretrained_folder import Pretrained


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How files are written, whatever the layout."""

    shard_bytes: int
    """Size of the largest file of weights."""
    card: CardMetadata | None
    """What README.md states besides what is recorded; None writes none."""
    advance: Advance = no_progress
    """Is told of each tensor when it is there."""


def write_native_layout(partial: Path, source: Pretrained | Pair, writing: Writing) -> None:
    """A weights folder of ours."""
    is_pair = isinstance(source, Pair)
    model = source.discriminator if is_pair else source
    pair = {"generator": source.generator.config, "sharing": source.sharing} if is_pair else {}
    files = {CONFIG_NAME: json_bytes(native_config(model.config, **pair, learnt=model.learnt))}
    origins = {"discriminator": model.origin, "generator": source.generator.origin if is_pair else None}
    files |= {origin_name(part): origin.to_json() for part, origin in origins.items() if origin is not None}
    tokenizer = load_tokenizer(model)
    contents = tokenizer.files() if tokenizer is not None else plain_files(model)
    files |= below(TOKENIZER_NAME, contents)
    # A release gets what it lacks, so that pretraining can go on from it; a task's model of ours stays what it is.
    is_whole = model.kind == "native" and model.origin is None
    tensors = source.tensors() if is_pair else not_fresh(model) if is_whole else model.tensors
    write_native(partial, tensors, files, shard_bytes=writing.shard_bytes, advance=writing.advance)


def write_huggingface(partial: Path, source: Pretrained | Pair, writing: Writing) -> None:
    """A folder that transformers loads with AutoModel, AutoTokenizer and AutoModelForMaskedLM.

    A pair's discriminator is the folder, its generator a folder in that.
    """
    if isinstance(source, Pair):
        write_huggingface_model(partial, source.discriminator, writing, {SHARING_FIELD: source.sharing})
        (partial / "generator").mkdir()
        write_huggingface_model(partial / "generator", source.generator, replace(writing, card=None))
    else:
        write_huggingface_model(partial, source, writing)


def write_huggingface_model(
    partial: Path, model: Pretrained, writing: Writing, more_fields: Mapping[str, str] = MappingProxyType({})
) -> None:
    """A folder of one model."""
    check_expressible(model.config)
    if DETECTOR not in model.tensors:
        warn_of_decoder(model.config)
    warn_of_mask(model.learnt, "transformers attends")
    dialect = choose_dialect(model)
    fields = to_huggingface_config(model.config, is_fused=dialect.is_fused, is_legacy=dialect.is_legacy)
    if DETECTOR in model.tensors:  # transformers has no class for it; its encoder is what is loaded
        fields["architectures"] = [fields["architectures"][0].replace("ForMaskedLM", "Model")]
    fields |= (other_fields(model.origin.fields) if model.origin else {}) | more_fields | learnt_fields(model)
    tensors = write_dialect(not_fresh(model), model.config, dialect)
    fields["dtype"] = str(most_common_type(tensors)).removeprefix("torch.")
    files = {CONFIG_NAME: json_bytes(fields)}
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        files |= tokenizer_files(tokenizer, max_length=trained_length(model))
    else:
        files |= plain_files(model)
    if writing.card is not None:
        files["README.md"] = model_card(model, tokenizer, writing.card).encode()
    write_files(partial, files)
    write_shards(partial, tensors, shard_bytes=writing.shard_bytes, advance=writing.advance)


def write_microsoft(partial: Path, source: Pretrained | Pair, writing: Writing) -> None:
    """A folder for the original code: `model_config.json`, `pytorch_model.bin`, `spm.model`; of a pair's generator,
    `generator_config.json` and `pytorch_model.generator.bin`.
    """
    is_pair = isinstance(source, Pair)
    model = source.discriminator if is_pair else source
    tokenizer = load_tokenizer(model)
    if tokenizer is not None and not tokenizer.rules.is_plain:
        raise CheckpointError(
            f"--to microsoft: the tokenizer {tokenizer.rules.describe()}; the original code has only {MODEL_FILE}, and "
            "would give other ids"
        )
    write_files(partial, {MODEL_FILE: tokenizer.spm_model} if tokenizer is not None else plain_files(model))
    if not is_pair:
        write_microsoft_model(partial, model, not_fresh(model), ("model_config.json", "pytorch_model.bin"), writing)
        return
    tensors = with_deltas(not_fresh(model), source.sharing)
    names = ("model_config.json", "pytorch_model.bin")
    write_microsoft_model(partial, model, tensors, names, writing, {SHARING_FIELD: source.sharing})
    names = ("generator_config.json", GENERATOR_NAME)
    write_microsoft_model(partial, source.generator, not_fresh(source.generator), names, writing)


def write_microsoft_model(
    partial: Path,
    model: Pretrained,
    tensors: LazyTensors,
    names: tuple[str, str],
    writing: Writing,
    more_fields: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The configuration and the weights of one model, in files of these names."""
    check_expressible_in_the_original(model.config)
    warn_of_mask(model.learnt, "the original attends")
    dialect = choose_dialect(model)._replace(prefix="deberta.", is_legacy=False)
    # The original takes v1's fused projections apart only together with those of position-to-content.
    dialect = dialect._replace(is_fused=dialect.is_fused and model.config.has_position_to_content)
    fields = to_microsoft_config(model.config) | (other_fields(model.origin.fields) if model.origin else {})
    write_files(partial, {names[0]: json_bytes(fields | more_fields | learnt_fields(model))})
    write_pickle(partial / names[1], write_dialect(tensors, model.config, dialect), writing.advance)


def learnt_fields(model: Pretrained) -> dict[str, str | int]:
    """What rides along in another world's configuration, which nothing there reads: how a model was trained is known
    of it here, whatever way it has come.
    """
    return {LEARNT[name]: value for name, value in model.learnt._asdict().items() if value is not None}


def with_deltas(tensors: LazyTensors, sharing: Sharing) -> LazyTensors:
    """A discriminator's tensors with zeros for what the original adds to a table that it never reads."""
    if sharing != "gdes":
        return tensors
    wholes = {rider_name(table): tensors.get(f"{table}.weight") for table in TABLES}
    return tensors | {
        name: constant(0.0, whole.shape, whole.dtype, f"nothing is added to {whole.place}")
        for name, whole in wholes.items()
        if name not in tensors and whole is not None
    }


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
    return recorded or model.learnt.sequence_length or model.config.max_position_embeddings


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
