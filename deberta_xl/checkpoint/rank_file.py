"""`rank-00000.safetensors`: what one rank held of the optimizer's state, as three flat float32 tensors and an index.

The tensors `master`, `exp_avg` and `exp_avg_sq` have one length: the rank's pieces of all parameters, one behind the
other. The index (JSON in the file's metadata) lists the pieces in that order as [name, shape, offset, numel]: the
parameter's canonical name, its shape on that rank, the piece's first element in the parameter's row-major flat view and
its length. `tensor_parallel` is [size, rank] of the tensor-parallel group that cut the shape; [1, 0] when nothing did.

So every layout of data parallelism writes the same information, and another layout needs only intersections of ranges.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deberta_xl.checkpoint.durable import sync_file
from deberta_xl.checkpoint.manifest import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""The float32 weights, and Adam's first and second moments (arXiv 1412.6980, algorithm 1: theta, m, v)."""

FORMAT = "deberta_xl rank file 1"
RANK_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")
WHOLE = (1, 0)
"""`tensor_parallel` of a file whose shapes are the parameters' own."""


class Piece(NamedTuple):
    """A contiguous range of one parameter, seen as a flat tensor."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the parameter on the rank."""
    offset: int
    """First element of the range."""
    numel: int
    """Elements of the range."""

    @property
    def end(self) -> int:
        """First element behind the range."""
        return self.offset + self.numel


class StoredPiece(NamedTuple):
    """A piece, and where its elements lie in its file."""

    piece: Piece
    path: Path
    position: int
    """First element in each of the file's flat tensors."""


StoredIndex = dict[str, list[StoredPiece]]
"""Parameter name → its pieces in all rank files of a checkpoint, by offset."""


def rank_file_name(rank: int) -> str:
    """`rank-00003.safetensors` for 3."""
    return f"rank-{rank:05d}.safetensors"


def is_rank_file(name: str) -> bool:
    """Whether a file of a checkpoint holds a rank's pieces."""
    return RANK_FILE_NAME.fullmatch(name) is not None


def write_rank_file(path: Path, pieces: Sequence[Piece], flat: Mapping[str, Tensor]) -> None:
    """Write the flat tensors of KINDS (float32, on the CPU, in the order of `pieces`) and force them to the disk."""
    total = sum(piece.numel for piece in pieces)
    assert all(flat[kind].shape == (total,) and flat[kind].dtype == torch.float32 for kind in KINDS)
    metadata = {"format": FORMAT, "tensor_parallel": json.dumps(WHOLE), "index": json.dumps(pieces)}
    try:
        save_file({kind: flat[kind] for kind in KINDS}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    sync_file(path)


def read_index(path: Path) -> list[StoredPiece]:
    """The pieces of a rank file. Raises CheckpointError when it is none, or cut by tensor parallelism."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} has the format {metadata.get('format')!r}; {FORMAT!r} is read here")
        if tuple(json.loads(metadata["tensor_parallel"])) != WHOLE:
            raise CheckpointError(
                f"{path} was written with tensor_parallel [size, rank] = {metadata['tensor_parallel']}, "
                "which cannot be read without tensor parallelism"
            )
        pieces = [Piece(name, tuple(shape), offset, n) for name, shape, offset, n in json.loads(metadata["index"])]
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a rank file: {error}") from None
    stored, position = [], 0
    for piece in pieces:
        stored.append(StoredPiece(piece, path, position))
        position += piece.numel
    return stored


def read_indices(paths: Iterable[Path]) -> StoredIndex:
    """Parameter name → its pieces in all `paths`, by offset.

    Raises CheckpointError when the pieces of a parameter do not cover it exactly once.
    """
    by_name: StoredIndex = {}
    for path in paths:
        for stored in read_index(path):
            by_name.setdefault(stored.piece.name, []).append(stored)
    for name, pieces in by_name.items():
        pieces.sort(key=lambda stored: stored.piece.offset)
        _check_cover(name, pieces)
    return by_name


def _check_cover(name: str, pieces: Sequence[StoredPiece]) -> None:
    """Refuse pieces (sorted) with a gap, an overlap or another shape."""
    shapes = {stored.piece.shape for stored in pieces}
    folder = pieces[0].path.parent
    if len(shapes) > 1:
        raise CheckpointError(f"{folder}: the rank files disagree about the shape of {name}: {sorted(shapes)}")
    reached = 0
    for stored in pieces:
        if stored.piece.offset != reached:
            raise CheckpointError(f"{stored.path}: a piece of {name} begins at {stored.piece.offset}, not at {reached}")
        reached = stored.piece.end
    if reached != math.prod(pieces[0].piece.shape):
        raise CheckpointError(f"{folder}: the rank files hold {reached} elements of {name} {pieces[0].piece.shape}")


def fill(wanted: Iterable[tuple[Piece, Tensor]], stored: StoredIndex, kind: str) -> None:
    """Copy the elements of each wanted piece, from whichever files hold them, into its flat tensor.

    Only the bytes needed are read, one file after the other. Asserts that what is copied is what is needed.
    """
    copies: dict[Path, list[tuple[int, Tensor]]] = {}
    for piece, target in wanted:
        copied = 0
        for candidate in stored[piece.name]:
            start, end = max(piece.offset, candidate.piece.offset), min(piece.end, candidate.piece.end)
            if start < end:
                source = candidate.position + start - candidate.piece.offset
                copies.setdefault(candidate.path, []).append(
                    (source, target[start - piece.offset : end - piece.offset])
                )
                copied += end - start
        assert copied == piece.numel == target.numel(), f"{copied} of {piece.numel} elements of {piece.name} found"
    for path, ranges in copies.items():
        with safe_open(path, framework="pt") as file:
            flat = file.get_slice(kind)
            for source, target in ranges:
                target.copy_(flat[source : source + target.numel()])


def check_shapes(folder: Path, stored: StoredIndex, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not the `expected` ones, naming every one that differs."""
    found = {name: pieces[0].piece.shape for name, pieces in stored.items()}
    complaints = [
        f"{name} is {found.get(name, 'missing')} in the checkpoint, {expected.get(name, 'missing')} in the model"
        for name in [*expected, *(name for name in found if name not in expected)]
        if found.get(name) != expected.get(name)
    ]
    if complaints:
        raise CheckpointError(
            f"{folder} does not fit the model: {'; '.join(complaints)}. Use the configuration it was saved with, "
            "or another run folder"
        )
