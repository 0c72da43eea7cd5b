"""Rank files of tensor-parallel ranks: written in one cut of the layers, read in any other, padding left out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_checkpoint import some_state, write_sharded_state

from deberta_xl.checkpoint.manifest import CheckpointError, file_facts, write_manifest
from deberta_xl.checkpoint.rank_file import (
    KINDS,
    Piece,
    check_shapes,
    fill,
    rank_file_name,
    read_indices,
    write_rank_file,
)
from deberta_xl.parallel.shard import Shard
from deberta_xl.weights.native import read_weights

# Rows 11 and 5 divide by neither 2 nor 4: the last shards are padded, one of them wholly.
SHAPES = {
    "word.weight": (11, 3),
    "up.weight": (8, 3),
    "up.bias": (8,),
    "down.weight": (3, 8),
    "down.bias": (3,),
    "convolution.weight": (2, 4, 3),
    "norm.weight": (3,),
    "scale": (),
    "head.bias": (5,),
}
DIMS = {"word.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1, "convolution.weight": 1, "head.bias": 0}
SIZES = (1, 2, 4)

cuts = st.lists(st.integers(0, sum(map(math.prod, SHAPES.values()))), max_size=3)


def piece_of_rank(name: str, size: int, rank: int) -> Piece:
    """All that a tensor-parallel rank holds of a parameter."""
    if size == 1 or name not in DIMS:
        return Piece(name, SHAPES[name], 0, math.prod(SHAPES[name]))
    shard = Shard(DIMS[name], rank, size, SHAPES[name])
    return Piece(name, shard.local_shape, 0, shard.numel, shard)


def slice_of_rank(full: torch.Tensor, name: str, size: int, rank: int) -> torch.Tensor:
    """The same by slicing, flat."""
    if size == 1 or name not in DIMS:
        return full.flatten()
    length = -(-full.shape[DIMS[name]] // size)
    index = [slice(None)] * DIMS[name] + [slice(rank * length, (rank + 1) * length)]
    return full[tuple(index)].flatten()


@settings(max_examples=25, deadline=None)
@given(cuts)
@pytest.mark.parametrize("saved_in", SIZES)
@pytest.mark.parametrize("loaded_in", SIZES)
def test_every_rank_of_any_size_finds_its_shard_in_the_files_of_any_other(tmp_path_factory, saved_in, loaded_in, cuts):
    state = some_state(SHAPES)
    stored = read_indices(write_sharded_state(tmp_path_factory.mktemp("ranks"), state, cuts, DIMS, saved_in))
    assert stored.logical_shapes == SHAPES
    for rank in range(loaded_in):
        pieces = [piece_of_rank(name, loaded_in, rank) for name in SHAPES]
        for kind in KINDS:
            wanted = [(piece, torch.full((piece.numel,), torch.nan)) for piece in pieces]
            fill(wanted, stored, kind)
            for piece, values in wanted:
                assert torch.equal(values, slice_of_rank(state[kind][piece.name], piece.name, loaded_in, rank))


@settings(max_examples=25, deadline=None)
@given(cuts, st.sampled_from(sorted(DIMS)), st.data())
@pytest.mark.parametrize("saved_in", SIZES)
@pytest.mark.parametrize("loaded_in", SIZES)
def test_any_range_of_a_shard_is_found(tmp_path_factory, saved_in, loaded_in, cuts, name, data):
    state = some_state(SHAPES)
    stored = read_indices(write_sharded_state(tmp_path_factory.mktemp("ranks"), state, cuts, DIMS, saved_in))
    rank = data.draw(st.integers(0, loaded_in - 1))
    whole = piece_of_rank(name, loaded_in, rank)
    offset = data.draw(st.integers(0, whole.numel))
    length = data.draw(st.integers(0, whole.numel - offset))
    target = torch.full((length,), torch.nan)
    fill([(whole._replace(offset=offset, numel=length), target)], stored, "exp_avg")
    expected = slice_of_rank(state["exp_avg"][name], name, loaded_in, rank)[offset : offset + length]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("size", SIZES)
def test_whole_weights_are_put_together_without_knowing_the_model(tmp_path, size):
    state = some_state(SHAPES)
    paths = write_sharded_state(tmp_path, state, [13, 40], DIMS, size)
    write_manifest(tmp_path, {path.name: file_facts(path) for path in paths})
    weights = read_weights(tmp_path)
    assert weights.keys() == SHAPES.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, state["master"][name]), name


def test_each_element_is_stored_once_and_padding_never(tmp_path):
    total = sum(math.prod(shape) for shape in SHAPES.values())
    for size in SIZES:
        paths = write_sharded_state(tmp_path / str(size), some_state(SHAPES), [], DIMS, size)
        lengths = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                lengths.append(file.get_slice("master").get_shape()[0])
        assert sum(lengths) == total


def test_a_file_states_the_cut_and_the_logical_shape_of_what_is_cut(tmp_path):
    _, path = write_sharded_state(tmp_path, some_state(SHAPES), [], DIMS, 2)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tensor_parallel"] == "[2, 1]"
    assert json.loads(metadata["sharded"]) == {name: [dim, list(SHAPES[name])] for name, dim in DIMS.items()}
    assert json.loads(metadata["index"])[:2] == [["word.weight", [6, 3], 0, 15], ["up.weight", [4, 3], 0, 12]]


def test_a_missing_tensor_parallel_rank_is_noticed(tmp_path):
    first, second = write_sharded_state(tmp_path, some_state(SHAPES), [], DIMS, 2)
    with pytest.raises(CheckpointError, match=r"hold 0 elements of word.weight \(11, 3\) in shard 1 of 2, not 15"):
        read_indices([first])
    with pytest.raises(CheckpointError, match=r"hold 0 elements of word.weight \(11, 3\) in shard 0 of 2, not 18"):
        read_indices([second])


def test_a_shard_that_is_there_twice_is_noticed(tmp_path):
    first, second = write_sharded_state(tmp_path, some_state(SHAPES), [], DIMS, 2)
    with pytest.raises(CheckpointError, match=r"word.weight begins at 0, not at 18 in shard 0 of 2"):
        read_indices([first, second, first])


def test_files_of_different_sizes_do_not_go_together(tmp_path):
    one = write_sharded_state(tmp_path / "1", some_state(SHAPES), [], DIMS, 1)
    two = write_sharded_state(tmp_path / "2", some_state(SHAPES), [], DIMS, 2)
    with pytest.raises(CheckpointError, match=r"disagree about how word.weight is cut"):
        read_indices([*one, *two])


SHARDS = [Shard(1, rank, 2, (3, 4)) for rank in range(2)]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([[(0, 2), (4, 2)], [(0, 6)]], "a begins at 4, not at 2 in shard 0 of 2"),
        ([[(0, 6)], [(0, 4), (2, 4)]], "a begins at 2, not at 4 in shard 1 of 2"),
        ([[(0, 6)], [(0, 4)]], r"hold 4 elements of a \(3, 4\) in shard 1 of 2, not 6"),
    ],
    ids=["gap", "overlap", "short"],
)
def test_pieces_that_do_not_cover_a_shard_exactly_once_are_refused(tmp_path, pieces, message):
    for shard, spans in zip(SHARDS, pieces, strict=True):
        flat = torch.zeros(sum(numel for _, numel in spans))
        write_rank_file(
            tmp_path / rank_file_name(shard.rank),
            [Piece("a", (3, 2), *span, shard) for span in spans],
            {kind: flat.clone() for kind in KINDS},
            (2, shard.rank),
        )
    with pytest.raises(CheckpointError, match=message):
        read_indices(sorted(tmp_path.iterdir()))


def test_a_shape_that_is_not_the_shards_is_refused(tmp_path):
    path = tmp_path / rank_file_name(0)
    flat = {kind: torch.zeros(12) for kind in KINDS}
    write_rank_file(path, [Piece("a", (3, 4), 0, 12, SHARDS[0])], flat, (2, 0))
    with pytest.raises(CheckpointError, match=r"a is \(3, 4\) there, which is not its Shard\(dim=1, rank=0, size=2"):
        read_indices([path])


def test_shape_errors_name_logical_shapes(tmp_path):
    stored = read_indices(write_sharded_state(tmp_path, some_state(SHAPES), [], DIMS, 2))
    check_shapes(tmp_path, stored, SHAPES)
    with pytest.raises(CheckpointError, match=r"word.weight is \(11, 3\) in the checkpoint, \(12, 3\) in the model"):
        check_shapes(tmp_path, stored, SHAPES | {"word.weight": (12, 3)})
