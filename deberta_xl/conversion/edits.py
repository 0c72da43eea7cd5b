"""Changes to a model on its way: averaging, a larger vocabulary, longer sequences, fewer layers.

Each is a function from a model to a model whose tensors are still read one at a time.

* `average_of_newest`: the mean of the weights of a run's newest whole checkpoints.
* `with_tokenizer`, `with_vocab_size`: rows follow their pieces; a new piece starts as the mean of the rows of the old
  pieces that its text had, a spare id as the mean of all.
* `with_positions`: a longer table of absolute positions repeats the old one; the relative table gets the rows that the
  old model uses for the same distances (`relative_rows`).
* `with_layers`: fewer layers, evenly spaced, the first and the last among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from deberta_xl.base.log import logger
from deberta_xl.checkpoint.folders import verify_checkpoint
from deberta_xl.checkpoint.lazy import LazyTensor, derived
from deberta_xl.checkpoint.manifest import CheckpointError, step_folders
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE
from deberta_xl.kernels.relative_index import log_bucket
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.names import DELTA
from deberta_xl.weights.native import open_native
from deberta_xl.weights.pair import split_part, with_part
from deberta_xl.weights.pretrained_folder import Pretrained, spaced_layers, with_layers_kept

WORD = "embeddings.word.weight"
OUTPUT_BIAS = "head.bias"
POSITION = "embeddings.position.weight"
RELATIVE = "encoder.relative_position.table.weight"


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What is to be changed; None leaves it as it is."""

    average: int | None = None
    """Newest checkpoints of a run whose mean is taken."""
    tokenizer: Path | None = None
    """Folder of a tokenizer with other pieces."""
    vocab_size: int | None = None
    """Rows of the word table."""
    max_position_embeddings: int | None = None
    max_relative_positions: int | None = None
    position_buckets: int | None = None
    num_layers: int | None = None


def apply_edits(model: Pretrained, edits: Edits) -> Pretrained:
    """The changed model. Raises CheckpointError for a change that makes no sense; every change is logged."""
    before = model
    if edits.tokenizer is not None:
        model = with_tokenizer(model, edits.tokenizer, edits.vocab_size)
    elif edits.vocab_size is not None:
        model = with_vocab_size(model, edits.vocab_size)
    model = with_positions(model, edits)
    if edits.num_layers is not None:
        model = with_layers(model, edits.num_layers)
    if model.config == before.config and model.tokenizer == before.tokenizer:
        return model
    # What a discriminator added to its tables was for the tables as they were, and so was what the way back restores.
    tensors = {name: tensor for name, tensor in model.tensors.items() if not name.endswith(DELTA)}
    if len(tensors) < len(model.tensors):
        logger.warning("what the discriminator added to its generator's tables is left out")
    return replace(model, tensors=tensors, origin=None)


def average_of_newest(run: Path, count: int) -> Pretrained:
    """The mean of the weights of the newest `count` whole checkpoints of a run, in float64."""
    if count < 2:
        raise CheckpointError(f"--average {count}: give the number of newest checkpoints to average, 2 or more")
    run, part = split_part(run)
    folders = step_folders(run / "checkpoints")
    whole = []
    for folder in folders:
        try:
            verify_checkpoint(folder, collective=False)
            whole.append(folder)
        except CheckpointError as damage:
            logger.warning("checkpoint passed over: %s", damage)
        if len(whole) == count:
            break
    if len(whole) < count:
        raise CheckpointError(f"--average {count}: {run} has {len(whole)} whole checkpoints; raise checkpoint.keep")
    models = [open_native(with_part(folder, part), may_be_fresh=True) for folder in whole]
    first = models[0]
    for other in models[1:]:
        if other.config != first.config:
            raise CheckpointError(f"{other.folder} is of another architecture than {first.folder}: no average")
    logger.info("average of %s", ", ".join(folder.name for folder in whole))
    tensors = {n: derived(mean, [model.tensors[n] for model in models], t.shape) for n, t in first.tensors.items()}
    return replace(first, tensors=tensors)


def mean(*tensors: Tensor) -> Tensor:
    """The mean, in the type of the first."""
    total = tensors[0].double()
    for tensor in tensors[1:]:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


# Vocabulary


def with_vocab_size(model: Pretrained, vocab_size: int) -> Pretrained:
    """More rows in the word table, without names: spare ids."""
    old = model.config.vocab_size
    if vocab_size < old:
        raise CheckpointError(f"--vocab_size {vocab_size} is less than the model's {old}; only more rows can be had")
    rows = torch.cat([torch.arange(old), torch.full((vocab_size - old,), -1)])
    return with_rows(model, rows, [f"spare id {number}" for number in range(old, vocab_size)])


def with_tokenizer(model: Pretrained, folder: Path, vocab_size: int | None) -> Pretrained:
    """Another tokenizer: a piece keeps its row, wherever its id is now; a new piece gets the mean of its old ones'."""
    old = model.read_tokenizer()
    if old is None:
        raise CheckpointError(
            f"--tokenizer: {model.folder} has no {MODEL_FILE}, so nobody knows which row belongs to which piece"
        )
    new = Tokenizer.load(folder)
    size = vocab_size or max(new.vocab_size, model.config.vocab_size)
    if size < new.vocab_size:
        raise CheckpointError(f"--vocab_size {size} is less than the {new.vocab_size} ids of {folder}")
    known = {old.id_to_piece(i): i for i in range(old.num_named)}
    pieces = [new.id_to_piece(i) for i in range(new.num_named)]
    rows = torch.full((size,), -1)
    rows[: len(pieces)] = torch.tensor([known.get(piece, -1) for piece in pieces])
    fresh = [number for number, piece in enumerate(pieces) if piece not in known]
    kept, lost = len(pieces) - len(fresh), len(known.keys() - set(pieces))
    logger.info("tokenizer %s: %d pieces keep their rows, %d old pieces are gone", folder, kept, lost)
    names = [*(pieces[number] for number in fresh), *(f"spare id {number}" for number in range(len(pieces), size))]
    return replace(with_rows(model, rows, names, old_pieces(old, new, fresh)), tokenizer=folder)


def old_pieces(old: Tokenizer, new: Tokenizer, fresh: Sequence[int]) -> dict[int, list[int]]:
    """For each new id of `fresh`, the ids into which `old` cuts its text, as far as it can write that."""
    found = {}
    for number in fresh:
        text = new.surface(number)
        # A piece that begins no word is the middle of one to the old tokenizer, too.
        ids = [i for i in old.encoder.ids(text, follows_mask=number not in new.added) if i != old.unk_id]
        if ids:
            found[number] = ids
    return found


def with_rows(
    model: Pretrained, rows: Tensor, fresh: list[str], parts: Mapping[int, list[int]] = MappingProxyType({})
) -> Pretrained:
    """The word table and the output bias with other rows: the old row `rows[i]`, or for −1 a new one.

    That is the mean of the old rows `parts[i]`, where it has some, and of all otherwise.
    """
    assert int((rows < 0).sum()) == len(fresh)
    if fresh:
        shown = ", ".join(fresh[:8]) + (", …" if len(fresh) > 8 else "")
        logger.info("vocabulary: %d rows, of which %d are new: %s", len(rows), len(fresh), shown)
        what = "new rows: %d start as the mean of their old pieces, %d as the mean of all rows"
        logger.info(what, len(parts), len(fresh) - len(parts))
    table, bias = model.tensors[WORD], model.tensors[OUTPUT_BIAS]
    changed = {
        WORD: derived(lambda old: take_rows(old, rows, parts), [table], (len(rows), table.shape[1])),
        OUTPUT_BIAS: derived(lambda old: take_rows(old, rows, parts), [bias], (len(rows),)),
    }
    return replace(model, config=replace(model.config, vocab_size=len(rows)), tensors=model.tensors | changed)


def take_rows(old: Tensor, rows: Tensor, parts: Mapping[int, list[int]]) -> Tensor:
    """The rows of a table in another order; −1 stands for the mean of the rows `parts[i]`, or of all."""
    new = old[rows.clamp(min=0)].clone()
    new[rows < 0] = old.double().mean(0).to(old.dtype)
    for row, ids in parts.items():
        new[row] = old[ids].double().mean(0).to(old.dtype)
    return new


# Positions


def with_positions(model: Pretrained, edits: Edits) -> Pretrained:
    """Longer sequences, farther distances, more buckets."""
    old = model.config
    length = old.max_position_embeddings if edits.max_position_embeddings is None else edits.max_position_embeddings
    # Unset, it would follow the longer table, and every bucket would stand for other distances.
    reach = old.relative_reach if edits.max_relative_positions is None else edits.max_relative_positions
    buckets = old.position_buckets if edits.position_buckets is None else edits.position_buckets
    if (length, reach, buckets) == (old.max_position_embeddings, old.relative_reach, old.position_buckets):
        return model
    for name, value, minimum in (
        ("max_position_embeddings", length, old.max_position_embeddings),
        ("max_relative_positions", reach, old.relative_reach),
        ("position_buckets", buckets, old.position_buckets),
    ):
        if value < minimum or bool(value) != bool(minimum):
            raise CheckpointError(f"--{name} {value}: the model has {minimum}; only more can be had")
    if not old.relative_rows and (reach, buckets) != (old.relative_reach, old.position_buckets):
        raise CheckpointError("--max_relative_positions, --position_buckets: pos_att_type=none has no relative table")
    new = replace(
        old,
        max_position_embeddings=length,
        max_relative_positions=reach if reach != length else None,
        position_buckets=buckets,
    )
    tensors = dict(model.tensors)
    if length != old.max_position_embeddings and POSITION in tensors:  # what reads none has none
        rows = torch.arange(length) % old.max_position_embeddings
        tensors[POSITION] = with_table_rows(tensors[POSITION], rows)
        logger.info("absolute positions: %d rows, the new ones repeat the old %d", length, old.max_position_embeddings)
    if (reach, buckets) != (old.relative_reach, old.position_buckets):
        tensors[RELATIVE] = with_table_rows(tensors[RELATIVE], relative_rows(old, new))
        logger.info("relative positions: %d rows, each as before for its distance", 2 * new.relative_span)
    return replace(model, config=new, tensors=tensors)


def with_table_rows(table: LazyTensor, rows: Tensor) -> LazyTensor:
    """A table made of the rows `rows` of another."""
    return derived(lambda old: old[rows], [table], (len(rows), *table.shape[1:]))


def relative_rows(old: DebertaConfig, new: DebertaConfig) -> Tensor:
    """For each row of the new relative table, the row of the old one to start from, [2k'].

    A row stands for a bucket of signed offsets i − j; it starts as what the old model uses for the nearest of them. So
    both models see the same row for every offset whose new bucket does not join two old ones, which with more buckets,
    or none, are all up to the old reach. Row 0, and rows whose bucket no offset falls into, copy their neighbour's.
    """
    reach = new.relative_reach
    offset = torch.arange(-(reach - 1), reach)
    rows = torch.full((2 * new.relative_span,), -1)
    # Far offsets first: the nearest of a bucket is written last, and stays.
    order = offset.abs().argsort(descending=True, stable=True)
    for here, there in zip(row_of(offset, new)[order].tolist(), row_of(offset, old)[order].tolist(), strict=True):
        rows[here] = there
    for row in range(new.relative_span - 1, -1, -1):
        rows[row] = rows[row] if rows[row] >= 0 else rows[row + 1]
    for row in range(new.relative_span, len(rows)):
        rows[row] = rows[row] if rows[row] >= 0 else rows[row - 1]
    return rows


def row_of(offset: Tensor, config: DebertaConfig) -> Tensor:
    """δ of eq. (3) for signed offsets."""
    span = config.relative_span
    buckets = config.position_buckets
    bucket = log_bucket(offset, buckets, config.relative_reach) if buckets else offset
    return (bucket + span).clamp(0, 2 * span - 1)


# Depth


def with_layers(model: Pretrained, num_layers: int) -> Pretrained:
    """Fewer layers, evenly spaced; the first, which has the convolution, and the last, which is the decoder, stay."""
    old = model.config.num_layers
    if not 2 <= num_layers <= old:
        raise CheckpointError(f"--num_layers {num_layers}: the model has {old} layers; allowed: 2 … {old}")
    kept = spaced_layers(old, num_layers)
    logger.info("layers: %s of 0 … %d", ", ".join(map(str, kept)), old - 1)
    tensors = with_layers_kept(model.tensors, kept)
    return replace(model, config=replace(model.config, num_layers=num_layers), tensors=tensors)
