"""Cutting a tensor: the shards of all ranks, put together without their padding, are the tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deberta_xl.parallel.shard import Shard, shard_of

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor without zeros, so that padding is told apart."""
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


@given(shapes, st.integers(1, 5))
def test_shards_of_rows_are_equal_in_shape_and_hold_each_row_once(shape, size):
    full = numbered(shape)
    shards = [Shard(0, rank, size, shape) for rank in range(size)]
    parts = [shard.cut(full) for shard in shards]
    assert {tuple(part.shape) for part in parts} == {shards[0].local_shape}
    joined = torch.cat(parts)
    assert torch.equal(joined[: shape[0]], full)
    assert not joined[shape[0] :].any()
    for shard, part in zip(shards, parts, strict=True):
        assert part.flatten()[: shard.numel].all()
        assert not part.flatten()[shard.numel :].any()
        assert torch.equal(part[: shard.end - shard.start], full[shard.start : shard.end])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_shards_of_columns_are_those_of_chunk(rows, width, size, inner):
    full = numbered((rows, width * size, inner))
    for rank, chunk in enumerate(full.chunk(size, dim=1)):
        shard = Shard(1, rank, size, tuple(full.shape))
        assert torch.equal(shard.cut(full), chunk)
        assert shard.local_shape == tuple(chunk.shape)
        assert shard.numel == chunk.numel()


@pytest.mark.parametrize(("size", "local_rows", "last_rows"), [(2, 251, 250), (4, 126, 123)])
def test_a_vocabulary_that_does_not_divide_is_padded_in_its_last_shard(size, local_rows, last_rows):
    shards = [Shard(0, rank, size, (501, 3)) for rank in range(size)]
    assert {shard.local_shape for shard in shards} == {(local_rows, 3)}
    assert [shard.end - shard.start for shard in shards] == [local_rows] * (size - 1) + [last_rows]
    assert sum(shard.numel for shard in shards) == 501 * 3


def test_shards_may_be_all_padding():
    assert [Shard(0, rank, 4, (5,)).numel for rank in range(4)] == [2, 2, 1, 0]
    assert torch.equal(Shard(0, 3, 4, (5,)).cut(numbered((5,))), torch.zeros(2))


def test_a_shard_is_a_copy_that_shares_nothing_with_the_tensor():
    full = torch.nn.Parameter(numbered((4, 2)))
    part = Shard(0, 0, 2, (4, 2)).cut(full)
    part.zero_()
    assert not part.requires_grad
    assert full.all()


def test_columns_that_do_not_divide_are_a_fault():
    with pytest.raises(AssertionError, match="4 does not divide 6"):
        Shard(1, 0, 4, (3, 6)).cut(numbered((3, 6)))


def test_a_parameter_says_whether_it_is_a_shard():
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert shard_of(parameter) is None
    parameter.tensor_parallel_shard = Shard(0, 1, 2, (3,))
    assert shard_of(parameter) == Shard(0, 1, 2, (3,))
