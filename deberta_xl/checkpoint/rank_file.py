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

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deberta_xl.base import signs
from deberta_xl.checkpoint.manifest import CheckpointError, FileFacts, inside, read_manifest
from deberta_xl.checkpoint.rectangles import Overlap, Rectangle, overlaps, range_rectangles, shard_area
from deberta_xl.checkpoint.stored_index import INDEX_NAME, FilePieces, Layout, StoredIndex, from_bytes, merged
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


Header = Mapping[str, str]
"""What a rank file says of itself: the metadata of its safetensors header."""


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


class Listed(NamedTuple):
    """A piece, as the header of a rank file lists it."""

    name: str
    shape: tuple[int, ...]
    """Of the parameter on the rank."""
    offset: int
    numel: int


def read_listed(path: Path, header: Header) -> tuple[list[Listed], dict[str, Shard]]:
    """The pieces that the header of the rank file `path` lists, and of each name what the rank has of the parameter.

    Raises CheckpointError when it is damaged.
    """
    try:
        listed = [Listed(name, tuple(shape), *place) for name, shape, *place in json.loads(header["index"])]
        shards = {one.name: Shard(0, 0, 1, one.shape) for one in listed} | _read_shards(header)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a rank file: {error}") from None
    for one in listed:
        shard = shards[one.name]
        if shard.size == 1 and shard.logical_shape != one.shape:
            raise another_shape(path, one.name, shard.logical_shape, one.shape)
        if shard.size > 1 and shard.local_shape != one.shape:
            raise CheckpointError(f"{path}: {one.name} is {one.shape} there, which is not its {shard}")
    return listed, shards


def another_shape(path: Path, name: str, *shapes: tuple[int, ...]) -> CheckpointError:
    """Of a parameter that is stored with several."""
    return CheckpointError(f"{path.parent}: the rank files disagree about the shape of {name}: {sorted(shapes)}")


def _read_shards(header: Header) -> dict[str, Shard]:
    """Parameter name → what the file's rank had of it, for the parameters that tensor parallelism cut."""
    size, rank = json.loads(header["tensor_parallel"])
    if (size, rank) == WHOLE:
        return {}
    sharded = json.loads(header["sharded"])
    return {name: Shard(dim, rank, size, tuple(shape)) for name, (dim, shape) in sharded.items()}


def read_stored(folder: Path) -> StoredIndex:
    """Where everything lies in a checkpoint: what its index says or, where an earlier version has left it without one,
    what each rank file says. Raises CheckpointError."""
    files = read_manifest(folder)
    if INDEX_NAME not in files:
        return read_indices(inside(folder, name) for name in files if is_rank_file(name))
    try:
        content = inside(folder, INDEX_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder / INDEX_NAME} cannot be read: {error.strerror}") from None
    stored = from_bytes(folder, content)
    if strangers := [path.name for path in stored.files if path.name not in files]:
        raise CheckpointError(f"{folder / INDEX_NAME} names {strangers[0]}, which the manifest does not")
    return stored


def read_indices(paths: Iterable[Path]) -> StoredIndex:
    """The index of all `paths`, each of which is opened here. Raises CheckpointError."""
    return join_headers((path, read_header(path)) for path in paths)


def join_headers(headers: Iterable[tuple[Path, Header]]) -> StoredIndex:
    """The index of all files with these headers.

    Raises CheckpointError when the pieces of a parameter do not cover it exactly once.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files, found = [], []
    for path, header in headers:
        signs.moved()
        listed, shards = read_listed(path, header)
        for name in (one.name for one in listed):
            shape = shards[name].logical_shape
            if shapes.setdefault(name, shape) != shape:
                raise another_shape(path, name, shapes[name], shape)
        files.append(path)
        found.append((listed, shards))
    numbers = {name: number for number, name in enumerate(shapes)}
    return merged(files, Layout([*shapes], [*shapes.values()]), (file_pieces(*of_file, numbers) for of_file in found))


def file_pieces(
    pieces: Sequence[Listed | Piece], shards: Mapping[str, Shard], numbers: Mapping[str, int]
) -> FilePieces:
    """As arrays; a parameter's number is what `numbers` says."""
    cut = next((shard for shard in shards.values() if shard.size > 1), Shard(0, 0, 1, ()))
    dims = {name: shard.dim if shard.size > 1 else -1 for name, shard in shards.items()}
    return FilePieces(
        cut.rank,
        cut.size,
        np.array([numbers[piece.name] for piece in pieces], np.int32),
        np.array([dims[piece.name] for piece in pieces], np.int8),
        np.array([piece.offset for piece in pieces], np.int64),
        np.array([piece.numel for piece in pieces], np.int64),
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
        for found in stored.look_up(piece.name, rectangles):
            for overlap in overlaps(found.rectangles, rectangles):
                copies.setdefault(found.path, []).append((found.position, overlap, target))
                copied += overlap.rows * overlap.columns
        assert copied == piece.numel == target.numel(), f"{copied} of {piece.numel} elements of {piece.name} found"
    for path, of_file in copies.items():
        with safe_open(path, framework="pt") as file:
            flat = file.get_slice(kind)
            for position, overlap, target in of_file:
                source = flat[position + overlap.source_start : position + overlap.source_end]
                overlap.copy(source, target)
                advance(overlap.rows * overlap.columns)


def check_shapes(folder: Path, stored: StoredIndex, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not the `expected` ones, naming every one that differs.

    `expected` maps names to logical shapes.
    """
    found = stored.logical_shapes
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
