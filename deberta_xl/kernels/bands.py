"""The relative rows laid out by offset, and the products with them added to scores without a gather.

Whatever row of the relative table an offset i − j falls into, all pairs of one offset share it. So the table is laid
out once with a row for every offset, a *band*, and the products of a tile of T queries with the T + n − 1 offsets that
they have to n keys are one matrix product. In it the scores of query t begin one column before those of query t − 1: as
a view with strides, the products stand where the scores do, and are added as they are (`skewed`). The third term, of
keys with the band of the other table, is the same with queries and keys exchanged.

Of a few chosen queries, each takes its scores out of its products with all offsets, and the third term is made for all
queries of which the chosen ones are taken, tile by tile.

Shape suffixes of this file:
    S queries (i)   T keys (j)   N heads on this rank   H head size   R relative rows (2k)   W offsets
    C queries or keys of a tile
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.kernels.registry import STRIDED_TILE, strided_columns

SPARE_ROWS = strided_columns(1, 2)
"""Of a band, behind its last offset, so that there are as many rows as a tile takes."""


class Bands(NamedTuple):
    """The relative rows laid out by offset, [N, W, H] each: 2 L − 1 offsets of the longest block, and spare rows of
    which nothing is taken."""

    key_NWH: Tensor | None
    """From offset L − 1 down."""
    query_NWH: Tensor | None
    """From offset −(L − 1) up."""


def laid_out(table_NRH: Tensor, rows_W: Tensor) -> Tensor:
    """Rows of the table one after another, and spare ones, [N, W, H]."""
    table_RD = table_NRH.transpose(0, 1).flatten(1)
    rows_W = F.pad(rows_W, (0, SPARE_ROWS))
    laid_WNH = F.embedding(rows_W, table_RD).unflatten(1, (len(table_NRH), -1))
    return laid_WNH.transpose(0, 1).contiguous()


def scores(query_NSH: Tensor, key_NTH: Tensor, bands: Bands, position_S: Tensor | None = None) -> Tensor:
    """Eq. (4) for one block, [N, S, T]; of queries at `position_S` among the keys, of all in order without."""
    length = key_NTH.shape[1]
    scores_NST = query_NSH.new_empty(*query_NSH.shape[:2], length)
    highest = min(STRIDED_TILE, length)
    room = query_NSH.new_empty(len(query_NSH) * highest * strided_columns(length, highest))
    if bands.key_NWH is None:
        torch.bmm(query_NSH, key_NTH.transpose(1, 2), out=scores_NST)
    else:
        if position_S is None:
            put_products(scores_NST, query_NSH, bands.key_NWH, room, torch.Tensor.copy_)
        else:
            products_NSW = query_NSH @ window(bands.key_NWH, slice(0, length), length).transpose(1, 2)
            torch.gather(products_NSW, 2, columns(position_S, length).expand_as(scores_NST), out=scores_NST)
        scores_NST.baddbmm_(query_NSH, key_NTH.transpose(1, 2))
    if bands.query_NWH is None:
        return scores_NST

    def add(scores_NCS: Tensor, of_all_NCT: Tensor) -> None:
        scores_NCS.add_(of_all_NCT if position_S is None else of_all_NCT[:, :, position_S])

    put_products(scores_NST.transpose(1, 2), key_NTH, bands.query_NWH, room, add)
    return scores_NST


def add_position_gradients(
    d_scores_NST: Tensor,
    heads: tuple[Tensor, Tensor],
    d_heads: tuple[Tensor, Tensor],
    bands: Bands,
    d_bands: Bands,
    position_S: Tensor | None = None,
) -> None:
    """Add the gradients of queries, keys and bands by way of the bands."""
    (query_NSH, key_NTH), (d_query_NSH, d_key_NTH) = heads, d_heads
    length = key_NTH.shape[1]
    if position_S is None:
        add_gradients(d_scores_NST, query_NSH, bands.key_NWH, d_query_NSH, d_bands.key_NWH)
    elif bands.key_NWH is not None:
        every_offset = (slice(0, length), length)
        d_products_NSW = d_scores_NST.new_zeros(*d_scores_NST.shape[:2], strided_columns(length, length))
        d_products_NSW.scatter_(2, columns(position_S, length).expand_as(d_scores_NST), d_scores_NST)
        d_query_NSH.baddbmm_(d_products_NSW, window(bands.key_NWH, *every_offset))
        window(d_bands.key_NWH, *every_offset).baddbmm_(d_products_NSW.transpose(1, 2), query_NSH)
    if position_S is not None:  # a position may have been chosen several times
        position_S, number_S = position_S.unique(return_inverse=True)
        shape = (len(d_scores_NST), len(position_S), length)
        d_scores_NST = d_scores_NST.new_zeros(shape).index_add_(1, number_S, d_scores_NST)
    add_gradients(d_scores_NST.transpose(1, 2), key_NTH, bands.query_NWH, d_key_NTH, d_bands.query_NWH, position_S)


def columns(position_S: Tensor, length: int) -> Tensor:
    """Where, in a query's products with all offsets, its scores are, int64 [S, T]."""
    return (length - 1 - position_S).unsqueeze(1) + torch.arange(length, device=position_S.device)


def tiles(length: int) -> Iterator[slice]:
    """Queries or keys that are taken together."""
    for start in range(0, length, STRIDED_TILE):
        yield slice(start, min(start + STRIDED_TILE, length))


def window(band_NWH: Tensor, tile: slice, length: int) -> Tensor:
    """Of a band, the offsets that a tile has to all of `length` tokens, and a few more; [N, W, H]."""
    first = (band_NWH.shape[1] - SPARE_ROWS + 1) // 2 - tile.stop
    return band_NWH[:, first : first + strided_columns(length, tile.stop - tile.start)]


def skewed(products_NCW: Tensor, length: int) -> Tensor:
    """View [N, C, length] of contiguous products with a window: row t begins at its column C − 1 − t."""
    num_heads, height, num_columns = products_NCW.shape
    first = products_NCW.storage_offset() + height - 1
    return products_NCW.as_strided((num_heads, height, length), (height * num_columns, num_columns - 1, 1), first)


def put_products(
    scores_NST: Tensor, x_NSH: Tensor, band_NWH: Tensor, room: Tensor, put: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Put the products of every token with the band's rows where the scores of its pairs are."""
    num_heads, length, _ = x_NSH.shape
    for tile in tiles(length):
        band = window(band_NWH, tile, length)
        shape = (num_heads, tile.stop - tile.start, band.shape[1])
        products_NCW = room[: math.prod(shape)].view(shape)
        torch.bmm(x_NSH[:, tile], band.transpose(1, 2), out=products_NCW)
        put(scores_NST[:, tile], skewed(products_NCW, length))


def add_gradients(
    d_scores_NST: Tensor,
    x_NSH: Tensor,
    band_NWH: Tensor | None,
    d_x_NSH: Tensor,
    d_band_NWH: Tensor | None,
    position_T: Tensor | None = None,
) -> None:
    """Add the gradients of both factors of `put_products`, of which those at `position_T` were taken, or all."""
    if band_NWH is None or d_band_NWH is None:
        return
    num_heads, length, _ = x_NSH.shape
    d_products_NCW = x_NSH.new_empty(0, 0, 0)
    for tile in tiles(length):
        height = tile.stop - tile.start
        if d_products_NCW.shape[1] != height:  # zero beside what is written, and stays so
            d_products_NCW = x_NSH.new_zeros(num_heads, height, strided_columns(length, height))
        if position_T is None:
            skewed(d_products_NCW, length).copy_(d_scores_NST[:, tile])
        else:
            skewed(d_products_NCW, length)[:, :, position_T] = d_scores_NST[:, tile]
        d_x_NSH[:, tile].baddbmm_(d_products_NCW, window(band_NWH, tile, length))
        window(d_band_NWH, tile, length).baddbmm_(d_products_NCW.transpose(1, 2), x_NSH[:, tile])
