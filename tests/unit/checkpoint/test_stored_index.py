"""The merged index of a checkpoint: what it says is what the rank files say, and as a file it is checked."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from small_checkpoint import some_state, write_sharded_state

from deberta_xl.checkpoint.manifest import CheckpointError, content_facts, file_facts, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS, Piece, fill, rank_file_name, read_indices, read_stored
from deberta_xl.checkpoint.stored_index import INDEX_NAME, FilePieces, Layout, from_bytes, merged, to_bytes
from deberta_xl.weights.native import read_weights

SHAPES = {"word.weight": (11, 3), "down.weight": (3, 8), "norm.weight": (3,), "scale": ()}
DIMS = {"word.weight": 0, "down.weight": 1}


@pytest.fixture(params=[1, 2, 4], ids="tp{}".format)
def stored(request, tmp_path):
    """Of a checkpoint that so many tensor-parallel ranks have written, in three parts each."""
    return read_indices(write_sharded_state(tmp_path, some_state(SHAPES), [5, 9], DIMS, request.param))


def test_as_a_file_it_is_the_same(stored, tmp_path):
    again = from_bytes(tmp_path, to_bytes(stored))
    assert again.files == stored.files
    assert list(again.parameters) == list(stored.parameters)
    for name, pieces in stored.parameters.items():
        other = again.parameters[name]
        assert other.cut == pieces.cut
        for own_P, others_P in zip(pieces[1:], other[1:], strict=True):
            assert np.array_equal(own_P, others_P)
            assert own_P.dtype == others_P.dtype


def test_with_it_no_rank_file_is_asked_where_anything_lies(tmp_path):
    state = some_state(SHAPES)
    paths = write_sharded_state(tmp_path, state, [5, 9], DIMS, 2)
    content = to_bytes(read_indices(paths))
    (tmp_path / INDEX_NAME).write_bytes(content)
    write_manifest(tmp_path, {path.name: file_facts(path) for path in paths} | {INDEX_NAME: content_facts(content)})
    weights = read_weights(tmp_path)
    assert all(torch.equal(weights[name], state["master"][name]) for name in SHAPES)
    for path in paths:
        path.unlink()
    assert read_stored(tmp_path).logical_shapes == SHAPES


def changed(content: bytes, **arrays: object) -> bytes:
    """The same index with other arrays; the metadata stay."""
    length = int.from_bytes(content[:8], "little")
    return save({**load(content), **arrays}, json.loads(content[8 : 8 + length])["__metadata__"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:40], "cannot be read as an index"),
        (lambda content: b"", "cannot be read as an index"),
        (lambda content: content.replace(b"deberta_xl index 1", b"deberta_xl index 9"), "has the format"),
        (lambda content: changed(content, file=load(content)["file"] + 9), "in shards or files that there are not"),
        (lambda content: changed(content, offset=load(content)["offset"][::-1].copy()), r"do not cover shard \d of"),
        (lambda content: changed(content, position=load(content)["position"] - 1), r"do not cover shard \d of"),
        (lambda content: changed(content, file=load(content)["file"][1:].copy()), "pieces are described"),
    ],
)
def test_a_damaged_file_is_refused(stored, tmp_path, damage, message):
    with pytest.raises(CheckpointError, match=message):
        from_bytes(tmp_path, damage(to_bytes(stored)))


def test_it_names_only_files_of_the_manifest(tmp_path):
    paths = write_sharded_state(tmp_path, some_state(SHAPES), [], DIMS, 2)
    content = to_bytes(read_indices(paths))
    (tmp_path / INDEX_NAME).write_bytes(content)
    write_manifest(tmp_path, {paths[0].name: file_facts(paths[0]), INDEX_NAME: content_facts(content)})
    with pytest.raises(CheckpointError, match=r"names rank-00001.safetensors, which the manifest does not"):
        read_stored(tmp_path)


def cut_by_zero(shapes: list[tuple[int, ...]], rank: int, ranks: int) -> FilePieces:
    """What ZeRO-3 leaves a rank of whole parameters: a range of each, none of most small ones."""
    sizes = np.array([math.prod(shape) for shape in shapes], np.int64)
    share = -(-sizes // ranks)
    offset_P = np.minimum(rank * share, sizes)
    size_P = np.minimum(share, sizes - offset_P)
    number_P = np.flatnonzero(size_P).astype(np.int32)
    return FilePieces(0, 1, number_P, np.full(len(number_P), -1, np.int8), offset_P[number_P], size_P[number_P])


def test_of_many_ranks_every_element_is_found_once_where_it_lies(tmp_path):
    ranks, shapes = 64, [(40, 7), (3,), (129,), (65, 5)]
    layout, files = Layout([f"p{n}" for n in range(4)], shapes), [tmp_path / rank_file_name(n) for n in range(ranks)]
    of_files = [cut_by_zero(shapes, rank, ranks) for rank in range(ranks)]
    index = from_bytes(tmp_path, to_bytes(merged(files, layout, of_files)))
    for number, shape in enumerate(shapes):
        numel = math.prod(shape)
        for first, last in ((0, numel - 1), (numel // 3, numel // 2), (numel - 1, numel - 1)):
            wanted = Piece(f"p{number}", shape, first, last + 1 - first)
            found = list(index.look_up(wanted.name, wanted.rectangles))
            begins = [one.rectangles[0].top * math.prod(shape[1:]) + one.rectangles[0].left for one in found]
            ends = [
                begin + sum(part.numel for part in one.rectangles) for begin, one in zip(begins, found, strict=True)
            ]
            assert begins[0] <= first
            assert ends[-1] > last
            assert begins[1:] == ends[:-1]
            for one, begin in zip(found, begins, strict=True):
                pieces = of_files[files.index(one.path)]
                place = pieces.number_P.tolist().index(number)
                assert pieces.offset_P[place] == begin
                assert pieces.size_P[:place].sum() == one.position


def test_only_the_pieces_that_share_something_are_looked_at(tmp_path):
    state = some_state({"a": (64, 64)})
    stored = read_indices(write_sharded_state(tmp_path, state, [*range(64, 4096, 64)], {"a": 1}, 2))
    wanted = Piece("a", (64, 64), 10 * 64, 2 * 64)
    assert len(list(stored.look_up("a", wanted.rectangles))) <= 8  # rows 10 and 11 of 64, in either half of the columns
    target = torch.empty(2 * 64)
    fill([(wanted, target)], stored, KINDS[0])
    assert torch.equal(target, state["master"]["a"][10:12].flatten())
