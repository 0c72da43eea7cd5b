"""Masks by a counter: the stated hash, the stated share, nothing in common between places, and no layout in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deberta_xl.kernels.contract import Where
from deberta_xl.kernels.dropout import LEVELS, WORDS_IN_CACHE, DropoutRule, keep_mask
from deberta_xl.kernels.relative_index import Buckets
from deberta_xl.model.dropout import DropoutKey

SEEDS = [DropoutKey(1).fold("test", number).seed for number in range(5)]


def stays(row: int, column: int, width: int, rule: DropoutRule) -> bool:
    """The documented hash, with Python's unlimited integers."""
    modulus = 2**32
    x = ((row * -(-width // 2) + column // 2) * (2 * (rule.seed >> 32) + 1) + rule.seed) % modulus
    x = (x ^ x >> 16) * 0x7FEB352D % modulus
    x = (x ^ x >> 15) * 0x846CA68B % modulus
    x ^= x >> 16
    half = x >> 16 if column % 2 else x & 0xFFFF
    return (half if half < LEVELS // 2 else half - LEVELS) + LEVELS // 2 >= rule.dropped_levels


@pytest.mark.parametrize("width", [1, 6, 7])
def test_a_mask_is_the_documented_hash_of_seed_row_and_column(width):
    rows = torch.tensor([0, 1, 5, 2**31 - 1, 2**40 + 3])
    for rule in (DropoutRule(0.3, SEEDS[0]), DropoutRule(0.5, 2**63 - 1), DropoutRule(0.1, 0)):
        expected = [[stays(row, column, width, rule) for column in range(width)] for row in rows.tolist()]
        assert keep_mask(rows, width, rule).tolist() == expected


def test_rows_may_be_drawn_in_any_order_and_in_tiles():
    rule = DropoutRule(0.2, SEEDS[0])
    rows = torch.arange(3 * WORDS_IN_CACHE // 64 + 5)
    whole = keep_mask(rows, 128, rule)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(keep_mask(order, 128, rule), whole[order])
    assert torch.equal(keep_mask(rows[-7:].view(1, 7), 128, rule)[0], whole[-7:])


def test_the_pairs_of_a_head_are_the_same_whoever_holds_it_and_whichever_queries_are_chosen():
    rule = DropoutRule(0.2, SEEDS[0])
    where = Where(torch.ones(2, 10, dtype=torch.int64), Buckets(0, 10))
    whole_BNST = keep_mask(where.pair_rows(0, 4), 10, rule)
    assert torch.equal(keep_mask(where.pair_rows(2, 2), 10, rule), whole_BNST[:, 2:])
    position = torch.tensor([[3, 9], [0, 5]])
    chosen_BNMT = keep_mask(where.of_queries(position).pair_rows(0, 4), 10, rule)
    for sequence in range(2):
        assert torch.equal(chosen_BNMT[sequence], whole_BNST[sequence][:, position[sequence]])


def centred(seed: int, rate: float) -> Tensor:
    """A mask of 2 sequences, 4 heads, 64 queries and 64 keys, with mean 0 and variance 1."""
    rule = DropoutRule(rate, seed)
    where = Where(torch.ones(2, 64, dtype=torch.int64), Buckets(0, 64))
    keep = 1 - rule.dropped_levels / LEVELS
    return (keep_mask(where.pair_rows(0, 4), 64, rule).double() - keep) / math.sqrt(keep * (1 - keep))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_is_right_and_neighbours_have_nothing_in_common(rate):
    for seed in SEEDS:
        mask_BNST = centred(seed, rate)
        products = {"mean": mask_BNST, "another seed": mask_BNST * centred(seed + 1, rate)}
        for name, dim in {"sequences": 0, "heads": 1, "queries": 2, "keys": 3}.items():
            products[name] = mask_BNST.narrow(dim, 1, mask_BNST.shape[dim] - 1) * mask_BNST.narrow(
                dim, 0, mask_BNST.shape[dim] - 1
            )
        for name, product in products.items():
            # A sum of n independent numbers of variance 1: five standard deviations, in 60 trials.
            assert abs(product.sum()) < 5 * math.sqrt(product.numel()), name


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_no_head_query_or_key_is_dropped_more_than_others_and_nothing_is_periodic(rate):
    for seed in SEEDS:
        mask_BNST = centred(seed, rate)
        for dims in ((0, 2, 3), (0, 1, 3), (0, 1, 2)):
            sums = mask_BNST.sum(dims) / math.sqrt(mask_BNST.numel() / mask_BNST.sum(dims).numel())
            # The mean of k squares of unit variance has the standard deviation sqrt(2 / k).
            assert abs((sums**2).mean() - 1) < 5 * math.sqrt(2 / len(sums))
        power = torch.fft.fft2(mask_BNST).abs().square() / 64**2
        # Exponentially distributed: the largest of 32768 would pass 20 once in 15,000 times.
        assert power.max() < 20


def test_a_rate_that_rounds_to_one_or_to_nothing_is_still_a_rate():
    rows = torch.arange(64)
    assert keep_mask(rows, 64, DropoutRule(1e-9, SEEDS[0])).all()
    assert keep_mask(rows, 64, DropoutRule(1 - 1e-9, SEEDS[0])).double().mean() < 0.01
