"""The geometry: what is copied between two cuts of a parameter is what slicing the whole tensor gives."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deberta_xl.checkpoint.rectangles import overlaps, range_rectangles, shard_area
from deberta_xl.parallel.shard import Shard

UNTOUCHED = -1.0


@st.composite
def ranges(draw, shape: tuple[int, ...]) -> tuple[Shard, int, int]:
    """Any shard of a parameter, and any range of its elements (offset, numel)."""
    dim = draw(st.integers(0, min(1, len(shape) - 1)))
    divisors = [size for size in (1, 2, 3, 4) if dim == 0 or shape[dim] % size == 0]
    size = draw(st.sampled_from(divisors))
    shard = Shard(dim, draw(st.integers(0, size - 1)), size, shape)
    # Often where the shard begins and ends, since long ranges are rare otherwise.
    start = draw(st.just(0) | st.integers(0, shard.numel))
    end = draw(st.just(shard.numel) | st.integers(start, shard.numel))
    return shard, start, end - start


def held(full: torch.Tensor, shard: Shard, offset: int, numel: int) -> torch.Tensor:
    """The range as a rank holds it, by slicing."""
    return shard.cut(full).flatten()[offset : offset + numel]


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 7), st.sampled_from([1, 4, 5, 6, 12]), st.sampled_from([(), (1,), (3,)]))
def test_what_two_ranges_share_is_copied_to_its_place_and_nothing_else(data, rows, columns, rest):
    shape = (rows, columns, *rest)
    full = torch.arange(float(math.prod(shape))).view(shape)
    from_shard, to_shard = data.draw(ranges(shape)), data.draw(ranges(shape))
    source, wanted = held(full, *from_shard), held(full, *to_shard)
    target = torch.full_like(wanted, UNTOUCHED)
    rectangles = [range_rectangles(shard_area(shard), *span) for shard, *span in (from_shard, to_shard)]
    copied = 0
    for overlap in overlaps(*rectangles):
        part = source[overlap.source_start : overlap.source_end].clone()  # nothing else is there to be read
        overlap.copy(part, target)
        copied += overlap.rows * overlap.columns
    shared = torch.isin(wanted, source)
    assert torch.equal(target, torch.where(shared, wanted, UNTOUCHED))
    assert copied == int(shared.sum())


@given(st.data(), st.integers(1, 9), st.integers(1, 8))
def test_a_range_is_at_most_three_rectangles_that_hold_its_elements_in_order(data, rows, columns):
    shard, offset, numel = data.draw(ranges((rows, columns)))
    full = torch.arange(rows * columns).view(rows, columns)
    found = range_rectangles(shard_area(shard), offset, numel)
    assert len(found) <= 3
    parts = [full[r.top : r.bottom, r.left : r.right].flatten() for r in found]
    assert torch.equal(torch.cat([full[:0, 0], *parts]), held(full, shard, offset, numel))
    assert [r.start for r in found] == [sum(part.numel() for part in parts[:i]) for i in range(len(parts))]


def test_runs_of_columns_are_copied_at_the_distances_of_either_side():
    full = torch.arange(24.0).view(3, 8)
    half, quarter = Shard(1, 1, 2, (3, 8)), Shard(1, 2, 4, (3, 8))
    target = torch.zeros(12)
    (overlap,) = overlaps(range_rectangles(shard_area(quarter), 0, 6), range_rectangles(shard_area(half), 0, 12))
    assert overlap == (3, 2, 0, 2, 0, 4)
    overlap.copy(quarter.cut(full).flatten(), target)
    assert target.tolist() == [4, 5, 0, 0, 12, 13, 0, 0, 20, 21, 0, 0]
    (overlap,) = overlaps(range_rectangles(shard_area(half), 4, 8), range_rectangles(shard_area(quarter), 0, 6))
    assert overlap == (2, 2, 0, 4, 2, 2)
    assert overlap.source_end == 6


def test_vectors_and_scalars_are_matrices_of_one_column():
    assert shard_area(Shard(0, 1, 2, (7,))) == (4, 7, 0, 1, 0)
    assert shard_area(Shard(0, 0, 1, ())) == (0, 1, 0, 1, 0)
