"""`rank-00000.safetensors`: what one rank held of the optimizer's state, as three flat float32 tensors and an index.

The tensors `master`, `exp_avg` and `exp_avg_sq` have one length: the rank's pieces of all parameters, one behind the
other. The index (JSON in the file's metadata) lists the pieces in that order as [name, shape, offset, numel]: the
parameter's canonical name, its shape on that rank, the piece's first element in the parameter's row-major flat view and
its length. `tensor_parallel` is [size, rank] of the writer in its tensor-parallel group; [1, 0] when there is none. If
the size is more than 1, `sharded` maps the names of parameters that are cut to [dimension, logical shape]; the others
are whole. Padding of shards is not stored.

So every layout writes the same information, and another layout needs only intersections (rectangles.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deberta_xl.base import signs
from deberta_xl.checkpoint.manifest import CheckpointError, FileFacts
from deberta_xl.checkpoint.rectangles import Overlap, Rectangle, overlaps, range_rectangles, shard_area
from deberta_xl.checkpoint.tensor_writer import Advance, write_flat
from deberta_xl.parallel.shard import Shard

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""The float32 weights, and Adam's first and second moments (arXiv 1412.6980, algorithm 1: theta, m, v)."""

FORMAT = "deberta_xl rank file 1"
RANK_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")
WHOLE = (1, 0)
"""(size, rank) of a process whose parameters are not cut by tensor parallelism."""


class Piece(NamedTuple):
    """A contiguous range of what a rank holds of one parameter, seen as a flat tensor."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the parameter on the rank."""
    offset: int
    """First element of the range."""
    numel: int
    """Elements of the range, none of them padding."""
    shard: Shard | None = None
    """How tensor parallelism cut the parameter; None when the rank holds all of it."""

    @property
    def end(self) -> int:
        """First element behind the range."""
        return self.offset + self.numel

    @property
    def cut(self) -> Shard:
        """The shard; for a whole parameter the only one there is."""
        return self.shard or Shard(0, 0, 1, self.shape)

    @property
    def rectangles(self) -> list[Rectangle]:
        """The range in the parameter's matrix."""
        return range_rectangles(shard_area(self.cut), self.offset, self.numel)


class StoredPiece(NamedTuple):
    """A piece, and where its elements lie in its file."""

    piece: Piece
    path: Path
    position: int
    """First element in each of the file's flat tensors."""
    rectangles: list[Rectangle]
    """Those of the piece; computed once, since every rank looks through all of them."""


Header = Mapping[str, str]
"""What a rank file says of itself: the metadata of its safetensors header."""
StoredIndex = dict[str, list[StoredPiece]]
"""Parameter name → its pieces in all rank files of a checkpoint, by shard and offset."""


def rank_file_name(rank: int) -> str:
    """`rank-00003.safetensors` for 3."""
    return f"rank-{rank:05d}.safetensors"


def is_rank_file(name: str) -> bool:
    """Whether a file of a checkpoint holds a rank's pieces."""
    return RANK_FILE_NAME.fullmatch(name) is not None


def write_rank_file(
    path: Path,
    pieces: Sequence[Piece],
    flat: Mapping[str, Tensor],
    tensor_parallel: tuple[int, int] = WHOLE,
    advance: Advance = signs.moved,
) -> FileFacts:
    """Write the flat tensors of KINDS (float32, on the CPU, in the order of `pieces`) and force them to the disk.

    `tensor_parallel` is (size, rank) of this process in its tensor-parallel group; `advance` is told of the bytes that
    are on the disk.
    """
    total = sum(piece.numel for piece in pieces)
    assert all(flat[kind].shape == (total,) and flat[kind].dtype == torch.float32 for kind in KINDS)
    assert all((piece.cut.size, piece.cut.rank) in (tensor_parallel, WHOLE) for piece in pieces)
    index = [(piece.name, piece.shape, piece.offset, piece.numel) for piece in pieces]
    metadata = {"format": FORMAT, "tensor_parallel": json.dumps(tensor_parallel), "index": json.dumps(index)}
    if tensor_parallel != WHOLE:
        sharded = {p.name: (p.shard.dim, p.shard.logical_shape) for p in pieces if p.shard is not None}
        metadata["sharded"] = json.dumps(sharded)
    return write_flat(path, {kind: flat[kind] for kind in KINDS}, metadata, advance)


def read_header(path: Path) -> Header:
    """The header of a rank file. Raises CheckpointError when it is no file of that kind."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a rank file: {error}") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} has the format {header.get('format')!r}; {FORMAT!r} is read here")
    return header


def read_index(path: Path, header: Header) -> list[StoredPiece]:
    """The pieces that the header of the rank file `path` lists. Raises CheckpointError when it is damaged."""
    try:
        shards = _read_shards(header)
        pieces = [
            Piece(name, tuple(shape), offset, numel, shards.get(name))
            for name, shape, offset, numel in json.loads(header["index"])
        ]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a rank file: {error}") from None
    stored, position = [], 0
    for piece in pieces:
        if piece.shard is not None and piece.shard.local_shape != piece.shape:
            raise CheckpointError(f"{path}: {piece.name} is {piece.shape} there, which is not its {piece.shard}")
        stored.append(StoredPiece(piece, path, position, piece.rectangles))
        position += piece.numel
    return stored


def _read_shards(header: Header) -> dict[str, Shard]:
    """Parameter name → what the file's rank had of it, for the parameters that tensor parallelism cut."""
    size, rank = json.loads(header["tensor_parallel"])
    if (size, rank) == WHOLE:
        return {}
    sharded = json.loads(header["sharded"])
    return {name: Shard(dim, rank, size, tuple(shape)) for name, (dim, shape) in sharded.items()}


def read_indices(paths: Iterable[Path]) -> StoredIndex:
    """`join_indices` of all `paths`, each of which is opened here."""
    return join_indices((path, read_header(path)) for path in paths)


def join_indices(headers: Iterable[tuple[Path, Header]]) -> StoredIndex:
    """Parameter name → its pieces in all rank files, by shard and offset.

    Raises CheckpointError when the pieces of a parameter do not cover it exactly once.
    """
    by_name: StoredIndex = {}
    for path, header in headers:
        signs.moved()
        for stored in read_index(path, header):
            by_name.setdefault(stored.piece.name, []).append(stored)
    for name, pieces in by_name.items():
        pieces.sort(key=lambda stored: (stored.piece.cut.rank, stored.piece.offset))
        _check_cover(name, pieces)
    return by_name


def _check_cover(name: str, pieces: Sequence[StoredPiece]) -> None:
    """Refuse pieces (sorted) with a gap, an overlap, another shape or another cut: all shards must be there, whole."""
    folder = pieces[0].path.parent
    shapes = {stored.piece.cut.logical_shape for stored in pieces}
    if len(shapes) > 1:
        raise CheckpointError(f"{folder}: the rank files disagree about the shape of {name}: {sorted(shapes)}")
    cuts = {stored.piece.cut._replace(rank=0) for stored in pieces}
    if len(cuts) > 1:
        raise CheckpointError(f"{folder}: the rank files disagree about how {name} is cut: {sorted(cuts)}")
    by_rank: dict[int, list[StoredPiece]] = {}
    for stored in pieces:
        by_rank.setdefault(stored.piece.cut.rank, []).append(stored)
    (cut,) = cuts
    for rank in range(cut.size):
        _check_shard_cover(folder, name, cut._replace(rank=rank), by_rank.get(rank, []))


def _check_shard_cover(folder: Path, name: str, shard: Shard, pieces: Sequence[StoredPiece]) -> None:
    """Refuse pieces (sorted) of a shard with a gap or an overlap."""
    which = f" in shard {shard.rank} of {shard.size}" if shard.size > 1 else ""
    reached, needed = 0, shard_area(shard).numel
    for stored in pieces:
        if stored.piece.offset != reached:
            raise CheckpointError(
                f"{stored.path}: a piece of {name} begins at {stored.piece.offset}, not at {reached}{which}"
            )
        reached = stored.piece.end
    if reached != needed:
        raise CheckpointError(
            f"{folder}: the rank files hold {reached} elements of {name} {shard.logical_shape}{which}, not {needed}"
        )


def fill(
    wanted: Iterable[tuple[Piece, Tensor]], stored: StoredIndex, kind: str, advance: Advance = signs.moved
) -> None:
    """Copy the elements of each wanted piece, from whichever files hold them, into its flat tensor.

    Only the bytes needed are read, one file after the other. Asserts that what is copied is what is needed. `advance`
    is told how many elements were copied.
    """
    copies: dict[Path, list[tuple[int, Overlap, Tensor]]] = {}
    for piece, target in wanted:
        copied, rectangles = 0, piece.rectangles
        for candidate in stored[piece.name]:
            for overlap in overlaps(candidate.rectangles, rectangles):
                copies.setdefault(candidate.path, []).append((candidate.position, overlap, target))
                copied += overlap.rows * overlap.columns
        assert copied == piece.numel == target.numel(), f"{copied} of {piece.numel} elements of {piece.name} found"
    for path, found in copies.items():
        with safe_open(path, framework="pt") as file:
            flat = file.get_slice(kind)
            for position, overlap, target in found:
                source = flat[position + overlap.source_start : position + overlap.source_end]
                overlap.copy(source, target)
                advance(overlap.rows * overlap.columns)


def logical_shapes(stored: StoredIndex) -> dict[str, tuple[int, ...]]:
    """Parameter name → the plain model's shape of it."""
    return {name: pieces[0].piece.cut.logical_shape for name, pieces in stored.items()}


def check_shapes(folder: Path, stored: StoredIndex, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not the `expected` ones, naming every one that differs.

    `expected` maps names to logical shapes.
    """
    found = logical_shapes(stored)
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
