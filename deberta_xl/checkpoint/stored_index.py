"""Where every element of a checkpoint lies: the pieces of all rank files, merged, as arrays.

A piece is a contiguous range of a shard of a parameter. Those of a parameter cover each of its shards exactly once, so
that their beginnings say all: one array of them, one of the files they lie in, one of their places there, by shard and
offset. Thousands of ranks have millions of pieces, and whoever looks for elements finds theirs by bisection.

`index.safetensors`, beside the manifest, holds these arrays one behind the other, and in its metadata what they are of.
So a start opens one file, not one for each rank that saved.

Array suffixes of this file:
    P pieces of all shards   S shards, and one more
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.rectangles import Rectangle, range_rectangles, shard_area
from deberta_xl.parallel.shard import Shard

INDEX_NAME = "index.safetensors"
FORMAT = "deberta_xl index 1"
ARRAYS = {"offset": np.int64, "file": np.int32, "position": np.int64}


class Pieces(NamedTuple):
    """Of one parameter."""

    cut: Shard
    """Its first shard; the only one where the parameter is whole."""
    offset_P: np.ndarray
    """First element of each piece in its shard, seen as a flat tensor without padding, int64."""
    file_P: np.ndarray
    """Number of the file that it lies in, int32."""
    position_P: np.ndarray
    """Its first element in each of that file's flat tensors, int64."""
    first_S: np.ndarray
    """Number of each shard's first piece, and at the end the number of pieces, int64."""

    def shard(self, rank: int) -> Shard:
        """That of a tensor-parallel rank."""
        return self.cut._replace(rank=rank)

    def overlapping(self, rank: int, first: int, last: int) -> range:
        """Numbers of the pieces of a shard that have elements among `first` … `last` of it."""
        begin, end = self.first_S[rank : rank + 2]
        offset_P = self.offset_P[begin:end]
        return range(
            int(begin + max(0, np.searchsorted(offset_P, first, "right") - 1)),
            int(begin + np.searchsorted(offset_P, last, "right")),
        )

    def rectangles(self, rank: int, number: int) -> list[Rectangle]:
        """What a piece of a shard is in the parameter's matrix."""
        area, is_last = shard_area(self.shard(rank)), number + 1 == self.first_S[rank + 1]
        end = area.numel if is_last else int(self.offset_P[number + 1])
        offset = int(self.offset_P[number])
        return range_rectangles(area, offset, end - offset)


class Found(NamedTuple):
    """A piece that has elements of what was looked for."""

    path: Path
    position: int
    """Its first element in each of the file's flat tensors."""
    rectangles: list[Rectangle]


class StoredIndex(NamedTuple):
    """Of a checkpoint."""

    files: list[Path]
    parameters: Mapping[str, Pieces]

    @property
    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → the plain model's shape of it."""
        return {name: pieces.cut.logical_shape for name, pieces in self.parameters.items()}

    def look_up(self, name: str, wanted: Sequence[Rectangle]) -> Iterator[Found]:
        """The pieces of a parameter that may have elements of these rectangles of its matrix, sorted by rows."""
        pieces = self.parameters[name]
        for rank in range(pieces.cut.size if wanted else 0):
            if (bounds := bounds_within(shard_area(pieces.shard(rank)), wanted)) is None:
                continue
            for number in pieces.overlapping(rank, *bounds):
                path = self.files[pieces.file_P[number]]
                yield Found(path, int(pieces.position_P[number]), pieces.rectangles(rank, number))


def bounds_within(area: Rectangle, wanted: Sequence[Rectangle]) -> tuple[int, int] | None:
    """The first and the last element of a shard's area, seen flat, between which all lie that the rectangles share with
    it; None where they share none."""
    shared = [
        (max(area.top, one.top), min(area.bottom, one.bottom), max(area.left, one.left), min(area.right, one.right))
        for one in wanted
    ]
    shared = [one for one in shared if one[0] < one[1] and one[2] < one[3]]
    if not shared:
        return None
    (top, _, left, _), (_, bottom, _, right) = shared[0], shared[-1]
    return area.position(top, left), area.position(bottom - 1, right - 1)


# From what single rank files say of themselves.


class Layout(NamedTuple):
    """The parameters that pieces are of, by their numbers."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    """Of the plain model's."""


class FilePieces(NamedTuple):
    """The pieces of one rank file, in their order in it: one behind the other."""

    rank: int
    """Of the file's writer among the tensor-parallel ranks."""
    num_ranks: int
    number_P: np.ndarray
    """Numbers of their parameters, int32."""
    dim_P: np.ndarray
    """The dimension along which the tensor-parallel ranks cut them, int8; −1 for whole parameters."""
    offset_P: np.ndarray
    """First element of each in what the rank has of the parameter, int64."""
    size_P: np.ndarray
    """Elements of each, int64."""


class Rows(NamedTuple):
    """Everything about pieces of any files, an element of each array for each of them."""

    number_P: np.ndarray
    rank_P: np.ndarray
    """Shard of the parameter."""
    offset_P: np.ndarray
    size_P: np.ndarray
    dim_P: np.ndarray
    num_shards_P: np.ndarray
    file_P: np.ndarray
    position_P: np.ndarray


def rows_of(file: int, pieces: FilePieces) -> Rows:
    """Those of a file."""
    is_cut_P = pieces.dim_P >= 0
    return Rows(
        pieces.number_P,
        np.where(is_cut_P, pieces.rank, 0),
        pieces.offset_P,
        pieces.size_P,
        np.maximum(pieces.dim_P, 0),
        np.where(is_cut_P, pieces.num_ranks, 1),
        np.full(len(is_cut_P), file),
        np.cumsum(pieces.size_P) - pieces.size_P,
    )


def merged(files: Sequence[Path], layout: Layout, of_files: Iterable[FilePieces]) -> StoredIndex:
    """The index of all files. Raises CheckpointError when the pieces of a parameter do not cover it exactly once."""
    of_each = [rows_of(number, pieces) for number, pieces in enumerate(of_files)]
    rows = Rows(*map(np.concatenate, zip(*of_each, strict=True)))
    order = np.lexsort((rows.size_P, rows.offset_P, rows.rank_P, rows.number_P))
    rows = Rows(*(column_P[order] for column_P in rows))
    bounds = np.searchsorted(rows.number_P, np.arange(len(layout.names) + 1))
    parameters = {}
    for name, shape, begin, end in zip(*layout, bounds[:-1], bounds[1:], strict=True):
        if begin < end:
            parameters[name] = arranged(files, name, shape, Rows(*(column_P[begin:end] for column_P in rows)))
    return StoredIndex([*files], parameters)


def arranged(files: Sequence[Path], name: str, shape: tuple[int, ...], rows: Rows) -> Pieces:
    """One parameter's sorted rows, checked."""
    cuts = sorted(set(zip(rows.dim_P.tolist(), rows.num_shards_P.tolist(), strict=True)))
    if len(cuts) > 1:
        found = " and ".join(f"into {size} along dimension {dim}" for dim, size in cuts)
        raise CheckpointError(f"{files[0].parent}: the rank files disagree about how {name} is cut: {found}")
    ((dim, size),) = cuts
    cut = Shard(dim, 0, size, shape)
    first_S = np.searchsorted(rows.rank_P, np.arange(size + 1))
    for rank in range(size):
        own = slice(first_S[rank], first_S[rank + 1])
        check_cover(files, name, cut._replace(rank=rank), Rows(*(column_P[own] for column_P in rows)))
    return Pieces(cut, rows.offset_P, rows.file_P.astype(np.int32), rows.position_P, first_S)


def check_cover(files: Sequence[Path], name: str, shard: Shard, rows: Rows) -> None:
    """Refuse sorted rows of a shard with a gap or an overlap."""
    which = f" in shard {shard.rank} of {shard.size}" if shard.size > 1 else ""
    reached_P = np.concatenate([[0], rows.offset_P + rows.size_P])
    if (wrong := np.flatnonzero(rows.offset_P != reached_P[:-1])).size:
        first = wrong[0]
        raise CheckpointError(
            f"{files[rows.file_P[first]]}: a piece of {name} begins at {rows.offset_P[first]}, not at "
            f"{reached_P[first]}{which}"
        )
    if reached_P[-1] != (needed := shard_area(shard).numel):
        raise CheckpointError(
            f"{files[0].parent}: the rank files hold {reached_P[-1]} elements of {name} {shard.logical_shape}{which}, "
            f"not {needed}"
        )


# As a file.


def to_bytes(index: StoredIndex) -> bytes:
    """The content of `index.safetensors`."""
    described, arrays = [], {name: [] for name in ARRAYS}
    for name, pieces in index.parameters.items():
        cut = pieces.cut
        described.append([name, cut.logical_shape, cut.dim, cut.size, np.diff(pieces.first_S).tolist()])
        for kind, of_parameter in arrays.items():
            of_parameter.append(getattr(pieces, f"{kind}_P"))
    metadata = {
        "format": FORMAT,
        "files": json.dumps([path.name for path in index.files]),
        "parameters": json.dumps(described),
    }
    flat = {kind: np.concatenate([np.zeros(0, ARRAYS[kind]), *found]) for kind, found in arrays.items()}
    return save(flat, metadata)


def from_bytes(folder: Path, content: bytes) -> StoredIndex:
    """The index that a checkpoint's `index.safetensors` holds. Raises CheckpointError when it is damaged."""
    place = folder / INDEX_NAME
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise CheckpointError(f"{place} has the format {metadata['format']!r}; {FORMAT!r} is read here")
        files = [folder / name for name in json.loads(metadata["files"])]
        parameters = divided(load(content), json.loads(metadata["parameters"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place} cannot be read as an index: {error}") from None
    for name, pieces in parameters.items():
        check_arrays(place, name, pieces, len(files))
    return StoredIndex(files, parameters)


def divided(flat: Mapping[str, np.ndarray], described: Sequence[Sequence[Any]]) -> dict[str, Pieces]:
    """Every parameter's part of the arrays."""
    parameters, begin = {}, 0
    for name, shape, dim, size, counts in described:
        first_S = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        end = begin + int(first_S[-1])
        arrays = (flat[kind][begin:end] for kind in ARRAYS)
        parameters[name] = Pieces(Shard(dim, 0, size, tuple(shape)), *arrays, first_S)
        begin = end
    if any(len(flat[kind]) != begin for kind in ARRAYS):
        raise ValueError(f"{begin} pieces are described, {len(flat['offset'])} are there")
    return parameters


def check_arrays(place: Path, name: str, pieces: Pieces, num_files: int) -> None:
    """Refuse what cannot be: it is read from a file."""
    if len(pieces.first_S) != pieces.cut.size + 1 or not ((pieces.file_P >= 0) & (pieces.file_P < num_files)).all():
        raise CheckpointError(f"{place}: {name} is said to lie in shards or files that there are not")
    for rank in range(pieces.cut.size):
        begin, end = pieces.first_S[rank : rank + 2]
        offset_P, needed = pieces.offset_P[begin:end], shard_area(pieces.shard(rank)).numel
        is_sorted = not needed or (len(offset_P) and offset_P[0] == 0 and (np.diff(offset_P) >= 0).all())
        if not is_sorted or (len(offset_P) and offset_P[-1] > needed) or (pieces.position_P[begin:end] < 0).any():
            raise CheckpointError(f"{place}: the pieces of {name} do not cover shard {rank} of {pieces.cut.size}")
