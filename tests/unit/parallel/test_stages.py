"""Which stage has which layers, and what each rank is for."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import forward_flops, masked_lm_parts
from deberta_xl.parallel.grid import Grid, check_stages
from deberta_xl.parallel.stages import Split, balanced_borders, split_model
from deberta_xl.settings.architecture import DebertaConfig

XXLARGE = DebertaConfig(
    vocab_size=128100, hidden_size=1536, num_layers=48, num_heads=24, intermediate_size=6144, conv_kernel_size=3
)
LOAD = Load(8, 512, 0.15 * 8 * 512)
"""Of a micro-batch."""


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_no_other_split_has_a_cheaper_dearest_part(costs, data):
    num_parts = data.draw(st.integers(1, len(costs)))
    borders = balanced_borders(tuple(costs), num_parts)
    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_parts - 1)]

    def dearest(candidate: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in pairwise(candidate))

    assert borders in every
    assert dearest(borders) == min(map(dearest, every))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8, 16, 48])
def test_the_stages_of_the_largest_preset_cover_it_and_are_even(num_stages):
    parts = masked_lm_parts(XXLARGE)
    split = split_model(parts, num_stages, LOAD)
    layers = [number for stage in range(num_stages) for number in split.layers(stage)]
    assert layers == list(range(48))
    assert sum(split.costs) == pytest.approx(forward_flops(parts, LOAD))
    # One layer more or less is all that neighbours can differ by; with few layers a stage that shows.
    assert split.imbalance < 1 + 1.1 * num_stages / 48


def test_the_mask_decoder_and_the_head_are_not_free():
    # In the base size, the head (128,100 words, 15 % of the tokens) makes the last unit dearer than two layers.
    split = split_model(masked_lm_parts(DebertaConfig(vocab_size=128100)), 2, LOAD)
    assert len(split.layers(0)) > len(split.layers(1))


def test_the_bubble_is_that_of_1f1b():
    even = Split((0, 1, 2, 3, 4), (1.0, 1.0, 1.0, 1.0))
    assert even.idle_share(1) == pytest.approx(3 / 4)
    assert even.idle_share(12) == pytest.approx(3 / 15)
    assert Split((0, 1, 2), (1.0, 3.0)).idle_share(10**9) == pytest.approx(1 / 3)


def test_the_start_tells_what_each_stage_has():
    told = split_model(masked_lm_parts(XXLARGE), 4, LOAD).describe(num_micro_batches=16)
    assert told.startswith("embeddings, layers 0–")
    assert "–47, prediction" in told
    assert "idle with 16 micro-batches" in told


@pytest.mark.parametrize(("tensor", "stages", "data"), [(1, 1, 1), (2, 1, 3), (1, 4, 2), (2, 3, 2)])
def test_every_rank_has_a_place_of_its_own_and_each_replica_one_voice(tensor, stages, data):
    world_size = tensor * stages * data
    grids = [Grid.of(rank, world_size, tensor, stages) for rank in range(world_size)]
    assert [grid.rank for grid in grids] == list(range(world_size))
    for voices in ([g for g in grids if g.counts_labels], [g for g in grids if g.reports_results]):
        assert sorted(g.data_parallel_rank for g in voices) == list(range(data))
    neighbours = [grids[first : first + tensor] for first in range(0, world_size, tensor)]
    assert all(len({g._replace(tensor_parallel_rank=0) for g in group}) == 1 for group in neighbours)


def test_more_stages_than_layers_are_refused():
    check_stages(XXLARGE, 48)
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=49 is more than model.num_layers=48.*choose 1 … 48"):
        check_stages(XXLARGE, 49)
