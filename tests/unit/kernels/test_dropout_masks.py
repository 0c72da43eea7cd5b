"""Masks by a counter: the stated hash, the stated share, nothing in common between places, and no layout in them."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from deberta_xl.kernels.contract import Where
from deberta_xl.kernels.dropout import LEVELS, WORDS_IN_CACHE, DropoutRule, Places, keep_mask, keep_pairs
from deberta_xl.kernels.relative_index import Buckets
from deberta_xl.model.dropout import DropoutKey

SEEDS = [DropoutKey(1).fold("test", number).seed for number in range(5)]
GOLDEN = [0x1E3BB633, 0x575A93CF, 0xABEF787E, 0x84F4F28B]


def finalise(x: int) -> int:
    """The documented hash of a word, with Python's unlimited integers."""
    modulus = 2**32
    x = (x % modulus ^ x % modulus >> 16) * 0x7FEB352D % modulus
    x = (x ^ x >> 15) * 0x846CA68B % modulus
    return x ^ x >> 16


def half_stays(word: int, column: int, rule: DropoutRule) -> bool:
    """Whether the column's half of a word is above the lowest that drop."""
    half = word >> 16 if column % 2 else word & 0xFFFF
    return (half if half < LEVELS // 2 else half - LEVELS) + LEVELS // 2 >= rule.dropped_levels


def stays(row: int, column: int, width: int, rule: DropoutRule) -> bool:
    """The documented rule of an element of states."""
    word = (row * -(-width // 2) + column // 2) * (2 * (rule.seed >> 32) + 1) + rule.seed
    return half_stays(finalise(word), column, rule)


def pair_stays(document: int, head: int, i: int, j: int, rule: DropoutRule) -> bool:
    """The documented rule of a pair."""
    of_head = finalise(finalise(rule.seed + document * 0x9E3779B9) + head * 0x85EBCA6B)
    start = finalise(of_head + i)
    stride = 2 * finalise((rule.seed >> 32) + start) + 1
    return half_stays(finalise(start + j // 2 * stride), j, rule)


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


def test_a_mask_of_pairs_is_the_documented_hash_of_document_head_query_and_key():
    document, position = torch.tensor([[0, 0, 7, 2**20]]), torch.tensor([[0, 511, 3, 8191]])
    for seed, first_head in ((SEEDS[0], 5), (2**63 - 1, 0), (0, 23)):
        rule = DropoutRule(0.3, seed, first_head)
        mask = keep_pairs(Places(document, position), 2, 9, rule)[0]
        for head, query, key in numpy.ndindex(2, 4, 9):
            places = int(document[0, query]), first_head + head, int(position[0, query]), key
            assert bool(mask[head, query, key]) == pair_stays(*places, rule), places


def test_the_hash_of_pairs_is_that_of_numpy_words_whatever_the_machine():
    """Golden numbers: a bit for each of keys 0 … 31, of queries 0 … 3 of document 1 in head 3."""
    mask = keep_pairs(Places(torch.ones(1, 4).long(), torch.arange(4)[None]), 1, 32, DropoutRule(0.4, 2**40 + 12345, 3))
    bits = [sum(bool(bit) << key for key, bit in enumerate(row)) for row in mask[0, 0]]
    assert bits == words_of_numpy() == GOLDEN


def words_of_numpy() -> list[int]:
    """The same by numpy's 32-bit words, which wrap around by themselves."""
    word = numpy.uint32

    def f(x: numpy.ndarray) -> numpy.ndarray:
        x = (x ^ x >> word(16)) * word(0x7FEB352D)
        x = (x ^ x >> word(15)) * word(0x846CA68B)
        return x ^ x >> word(16)

    with numpy.errstate(over="ignore"):
        of_head = f(f(word(12345) + word(0x9E3779B9)) + word(3) * word(0x85EBCA6B))
        start = f(of_head + numpy.arange(4, dtype=word))[:, None]
        stride = word(2) * f(word(2**8) + start) + word(1)
        words = f(start + numpy.arange(16, dtype=word) * stride)
    halves = words.view(numpy.int16)  # little-endian: the lower half first
    stays = halves >= round(0.4 * 2**16) - 2**15
    return [int(bits) for bits in numpy.packbits(stays, axis=1, bitorder="little").view("<u4")[:, 0]]


def masks_of_documents(segments: list[list[int]], heads: slice, queries: Tensor | None = None) -> list[Tensor]:
    """The pairs of each document, cut out of the mask of their rows; of chosen queries, those that are in it."""
    where = Where(torch.tensor(segments), Buckets(0, 10))
    where = where if queries is None else where.of_queries(queries)
    rule = DropoutRule(0.4, SEEDS[0], first_head=heads.start)
    mask_BNST = keep_pairs(where.places, heads.stop - heads.start, len(segments[0]), rule)
    cut = []
    for row, start, length, _ in where.spans:
        end = start + length
        position = torch.arange(len(segments[0])) if queries is None else queries[row]
        cut.append(mask_BNST[row][:, (position >= start) & (position < end), start:end])
    return cut


PACKED = [[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [5, 5, 5, 5, 5, 5, 5, 0, 1, 1]]
PADDED = [[1, 1, 1, 0, 0, 0, 0], [1] * 4 + [0] * 3, [0] * 5 + [1] * 2, [1] * 7, [2, 2] + [0] * 5]


def test_documents_have_their_masks_however_they_are_packed_or_padded_and_whoever_holds_the_heads():
    packed, padded = masks_of_documents(PACKED, slice(0, 4)), masks_of_documents(PADDED, slice(0, 4))
    sliced = masks_of_documents(PACKED, slice(1, 3))
    for whole, other, some in zip(packed, padded, sliced, strict=True):
        assert torch.equal(whole, other)
        assert torch.equal(whole[1:3], some)
    alone = keep_pairs(Places(torch.tensor([[3] * 7]), torch.arange(7)[None]), 4, 7, DropoutRule(0.4, SEEDS[0]))
    assert torch.equal(alone[0], packed[3])


def test_chosen_queries_have_the_masks_that_they_have_among_all():
    queries = torch.tensor([[8, 4, 0], [6, 1, 9]])
    for whole, some, kept in zip(
        masks_of_documents(PACKED, slice(0, 4)),
        masks_of_documents(PACKED, slice(0, 4), queries),
        [[0], [1], [1], [6, 1], [1]],
        strict=True,
    ):
        assert torch.equal(some, whole[:, kept])


def test_a_mask_of_pairs_makes_each_row_a_document():
    mask = torch.ones(2, 6, 6).bool()
    rows = Where(torch.ones(2, 6).long(), Buckets(0, 6), mask).places
    whole = Where(torch.ones(2, 6).long(), Buckets(0, 6)).places
    assert all(torch.equal(one, other) for one, other in zip(rows, whole, strict=True))


def centred(seed: int, rate: float) -> Tensor:
    """A mask of 2 sequences, 4 heads, 64 queries and 64 keys, with mean 0 and variance 1."""
    rule = DropoutRule(rate, seed)
    where = Where(torch.ones(2, 64, dtype=torch.int64), Buckets(0, 64))
    keep = 1 - rule.dropped_levels / LEVELS
    return (keep_pairs(where.places, 4, 64, rule).double() - keep) / math.sqrt(keep * (1 - keep))


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
