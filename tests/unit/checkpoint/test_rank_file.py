"""Rank files: what was written in some pieces is read in any others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_checkpoint import some_state, write_state

from deberta_xl.checkpoint import tensor_writer
from deberta_xl.checkpoint.manifest import CheckpointError, file_facts
from deberta_xl.checkpoint.rank_file import KINDS, Piece, check_shapes, fill, read_indices, write_rank_file

SHAPES = {"embedding.weight": (5, 3), "norm.bias": (4,), "scale": ()}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())

cuts = st.lists(st.integers(0, TOTAL), max_size=4)


@settings(max_examples=60, deadline=None)
@given(cuts, st.sampled_from(sorted(SHAPES)), st.data())
def test_any_range_of_any_parameter_is_read_from_any_cut(tmp_path_factory, cuts, name, data):
    folder = tmp_path_factory.mktemp("ranks")
    state = some_state(SHAPES)
    stored = read_indices(write_state(folder, state, cuts))
    numel = math.prod(SHAPES[name])
    offset = data.draw(st.integers(0, numel - 1))
    length = data.draw(st.integers(1, numel - offset))
    for kind in KINDS:
        target = torch.full((length,), torch.nan)
        fill([(Piece(name, SHAPES[name], offset, length), target)], stored, kind)
        assert torch.equal(target, state[kind][name].flatten()[offset : offset + length])


def test_a_rank_file_is_an_ordinary_safetensors_file_of_three_flat_tensors(tmp_path):
    path, _ = write_state(tmp_path, some_state(SHAPES), [7])
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(KINDS)
        assert {tuple(file.get_slice(kind).get_shape()) for kind in KINDS} == {(7,)}
        assert file.metadata()["index"] == '[["embedding.weight", [5, 3], 0, 7]]'
        assert file.metadata()["tensor_parallel"] == "[1, 0]"


def test_a_rank_file_can_be_read_by_those_who_can_read_its_folder(tmp_path):
    tmp_path.chmod(0o755)
    path, _ = write_state(tmp_path, some_state(SHAPES), [7])
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_hash_taken_while_writing_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_writer, "WRITTEN_AT_ONCE", 16)
    values = {kind: torch.arange(12.0) + number for number, kind in enumerate(KINDS)}
    path = tmp_path / "rank-00000.safetensors"
    assert write_rank_file(path, [Piece("a", (3, 4), 0, 12)], values) == file_facts(path)


def test_a_rank_without_a_share_writes_an_empty_file(tmp_path):
    paths = write_state(tmp_path, some_state(SHAPES), [7, 7])
    assert read_indices(paths[1:2]).parameters == {}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("a", (6,), 0, 2), Piece("a", (6,), 4, 2)], "begins at 4, not at 2"),
        ([Piece("a", (6,), 0, 4), Piece("a", (6,), 2, 4)], "begins at 2, not at 4"),
        ([Piece("a", (6,), 0, 4)], r"hold 4 elements of a \(6,\)"),
        ([Piece("a", (6,), 0, 6), Piece("a", (2, 3), 6, 0)], "disagree about the shape of a"),
    ],
    ids=["gap", "overlap", "short", "two shapes"],
)
def test_pieces_that_do_not_cover_a_parameter_exactly_once_are_refused(tmp_path, pieces, message):
    flat = torch.zeros(sum(piece.numel for piece in pieces))
    write_rank_file(tmp_path / "rank-00000.safetensors", pieces, {kind: flat.clone() for kind in KINDS})
    with pytest.raises(CheckpointError, match=message):
        read_indices([tmp_path / "rank-00000.safetensors"])


def test_a_rank_file_of_a_tensor_parallel_rank_must_say_what_is_cut(tmp_path):
    path = tmp_path / "rank-00000.safetensors"
    metadata = {"format": "deberta_xl rank file 1", "tensor_parallel": "[2, 0]", "index": '[["a", [3], 0, 3]]'}
    save_file({kind: torch.zeros(3) for kind in KINDS}, path, metadata)
    with pytest.raises(CheckpointError, match="cannot be read as a rank file: 'sharded'"):
        read_indices([path])


def test_another_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "rank-00000.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="has the format None"):
        read_indices([path])


def test_parameters_that_do_not_fit_are_all_named_with_both_shapes(tmp_path):
    stored = read_indices(write_state(tmp_path, some_state(SHAPES), []))
    check_shapes(tmp_path, stored, SHAPES)
    with pytest.raises(CheckpointError) as caught:
        check_shapes(tmp_path, stored, {"embedding.weight": (3, 5), "norm.bias": (4,), "new": (1,)})
    message = str(caught.value)
    assert "embedding.weight is (5, 3) in the checkpoint, (3, 5) in the model" in message
    assert "new is missing in the checkpoint, (1,) in the model" in message
    assert "scale is () in the checkpoint, missing in the model" in message
    assert "norm.bias" not in message
