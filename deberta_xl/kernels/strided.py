"""Disentangled attention without a gather, document by document, with a backward pass of its own.

Whatever row of the relative table an offset i − j falls into, all pairs of one offset share it. So the table is laid
out once with a row for every offset, a *band*, and the products of a tile of T queries with the T + n − 1 offsets that
they have to n keys are one matrix product. In it the scores of query t begin one column before those of query t − 1: as
a view with strides, the products stand where the scores do, and are added as they are (`skewed`). The third term, of
keys with the band of the other table, is the same with queries and keys exchanged.

For the backward pass the probabilities are kept, and what dropout leaves of them as one byte each; nothing else grows
with the square of the length.

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   N heads on this rank   H head size   R relative rows (2k)   W offsets
    C queries or keys of a tile
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deberta_xl.kernels import reference
from deberta_xl.kernels.contract import Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule, Places, keep_pairs
from deberta_xl.kernels.relative_index import offset_rows

TILE = 64


class Block(NamedTuple):
    """Queries and keys of one row that are attended among themselves: a document; or a row, under a mask."""

    row: int
    tokens: slice
    places: Places
    blocked_ST: Tensor | None = None
    """Which pairs do not see each other (bool); None where all do."""

    @property
    def length(self) -> int:
        """Queries, and keys."""
        return self.tokens.stop - self.tokens.start

    def cut(self, *of_rows_BNSH: Tensor) -> list[Tensor]:
        """Of each, the block, [N, S, H]."""
        return [x_BNSH[self.row, :, self.tokens] for x_BNSH in of_rows_BNSH]


class Bands(NamedTuple):
    """The relative rows laid out by offset, [N, W, H] each; W = 2 L − 1 offsets of the longest block."""

    key_NWH: Tensor | None
    """From offset L − 1 down."""
    query_NWH: Tensor | None
    """From offset −(L − 1) up."""


def attention(query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Tensor:
    """The contract's `Attend`. Of chosen queries, which are few, as the reference does it."""
    if where.position_BM is not None:
        return reference.attention(query_BNSH, memory, relative, where, dropout)
    dtype = query_BNSH.dtype
    score_dtype = torch.promote_types(dtype, torch.float32)
    blocks = list(blocks_of(where))
    num_terms = 1 + sum(rows is not None for rows in relative)
    scale = 1 / math.sqrt(query_BNSH.shape[-1] * num_terms)
    longest = max((block.length for block in blocks), default=1)
    rows_W = offset_rows(longest, where.buckets, query_BNSH.device)
    inputs = (
        query_BNSH.to(score_dtype) * scale,
        *(x.to(score_dtype) for x in memory),
        None if relative.key_NRH is None else laid_out(relative.key_NRH.to(score_dtype), rows_W.flip(0)),
        None if relative.query_NRH is None else laid_out(relative.query_NRH.to(score_dtype) * scale, rows_W),
    )
    is_kept = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return Strided.apply(*inputs, blocks, dropout.with_seed() if dropout.rate else dropout, is_kept).to(dtype)


def laid_out(table_NRH: Tensor, rows_W: Tensor) -> Tensor:
    """Rows of the table one after another, [N, W, H]."""
    table_RD = table_NRH.transpose(0, 1).flatten(1)
    laid_WNH = F.embedding(rows_W, table_RD).unflatten(1, (len(table_NRH), -1))
    return laid_WNH.transpose(0, 1).contiguous()


def blocks_of(where: Where) -> Iterator[Block]:
    """The documents of a micro-batch; its rows, where a mask of pairs is given or a document is not of one piece."""
    spans = where.spans
    places = where.places
    if where.mask_BST is not None or len({(span.row, span.segment) for span in spans}) < len(spans):
        for row, blocked_ST in enumerate(where.blocked_BST):
            yield Block(row, slice(0, len(blocked_ST)), Places(*(x[row : row + 1] for x in places)), blocked_ST)
        return
    for row, start, length, _ in spans:
        tokens = slice(start, start + length)
        of_document = Places(places.document[row : row + 1, tokens], places.position[row : row + 1, tokens])
        blocked_ST = None
        if where.open_BT is not None:
            is_later_ST = torch.ones(length, length, dtype=torch.bool, device=where.open_BT.device).triu_(1)
            blocked_ST = is_later_ST & ~where.open_BT[row, tokens]
        yield Block(row, tokens, of_document, blocked_ST)


class Strided(torch.autograd.Function):
    """Attention of scaled queries, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BNSH: Tensor,
        key_BNTH: Tensor,
        value_BNTH: Tensor,
        key_band_NWH: Tensor | None,
        query_band_NWH: Tensor | None,
        blocks: list[Block],
        dropout: DropoutRule,
        is_kept: bool,
    ) -> Tensor:
        """The context of all blocks, zeros elsewhere. What the backward pass needs is kept if it `is_kept`."""
        bands = Bands(key_band_NWH, query_band_NWH)
        context_BNSH = like_heads(query_BNSH, blocks)
        kept = []
        for block in blocks:
            query, key, value, context = block.cut(query_BNSH, key_BNTH, value_BNTH, context_BNSH)
            weights_NST = normalized(scores(query, key, bands), block.blocked_ST)
            stays_NST = None
            if dropout.rate:
                stays_NST = keep_pairs(block.places, len(query), block.length, dropout)[0]
            torch.bmm(dropped(weights_NST, stays_NST), value, out=context)
            if is_kept:
                kept += [weights_NST, stays_NST]
        if dropout.rate:
            context_BNSH.mul_(dropout.scale)
        ctx.save_for_backward(query_BNSH, key_BNTH, value_BNTH, *bands, *kept)
        ctx.blocks, ctx.scale = blocks, dropout.scale
        return context_BNSH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BNSH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, values and both bands."""
        saved = ctx.saved_tensors  # once: what is recomputed may be taken but once
        inputs, bands, kept = saved[:3], Bands(*saved[3:5]), saved[5:]
        gradients = [like_heads(x, ctx.blocks) for x in inputs]
        d_bands = Bands(*(None if band is None else torch.zeros_like(band) for band in bands))
        if ctx.scale != 1:
            gradient_BNSH = gradient_BNSH * ctx.scale
        for block, weights_NST, stays_NST in zip(ctx.blocks, kept[::2], kept[1::2], strict=True):
            gradient, query, key, value = block.cut(gradient_BNSH, *inputs)
            d_query, d_key, d_value = block.cut(*gradients)
            torch.bmm(dropped(weights_NST, stays_NST).transpose(1, 2), gradient, out=d_value)
            d_NST = dropped(gradient @ value.transpose(1, 2), stays_NST)
            torch.ops.aten._softmax_backward_data.out(d_NST, weights_NST, -1, d_NST.dtype, grad_input=d_NST)
            torch.bmm(d_NST, key, out=d_query)
            torch.bmm(d_NST.transpose(1, 2), query, out=d_key)
            add_gradients(d_NST, query, bands.key_NWH, d_query, d_bands.key_NWH)
            add_gradients(d_NST.transpose(1, 2), key, bands.query_NWH, d_key, d_bands.query_NWH)
        return *gradients, *d_bands, None, None, None


def like_heads(x_BNSH: Tensor, blocks: list[Block]) -> Tensor:
    """Room for all blocks, zeros elsewhere, [B, N, S, H]; a token's heads lie side by side, as layers have them."""
    shape = x_BNSH.transpose(1, 2).shape
    is_covered = sum(block.length for block in blocks) == shape[:2].numel()
    room_BSNH = x_BNSH.new_empty(shape) if is_covered else x_BNSH.new_zeros(shape)
    return room_BSNH.transpose(1, 2)


def scores(query_NSH: Tensor, key_NTH: Tensor, bands: Bands) -> Tensor:
    """Eq. (4) for one block, [N, S, T]."""
    num_heads, length, _ = query_NSH.shape
    scores_NST = query_NSH.new_empty(num_heads, length, length)
    room = query_NSH.new_empty(num_heads * min(TILE, length) * (length + TILE))
    if bands.key_NWH is None:
        torch.bmm(query_NSH, key_NTH.transpose(1, 2), out=scores_NST)
    else:
        put_products(scores_NST, query_NSH, bands.key_NWH, room, torch.Tensor.copy_)
        scores_NST.baddbmm_(query_NSH, key_NTH.transpose(1, 2))
    if bands.query_NWH is not None:
        put_products(scores_NST.transpose(1, 2), key_NTH, bands.query_NWH, room, torch.Tensor.add_)
    return scores_NST


def tiles(length: int) -> Iterator[slice]:
    """Queries or keys that are taken together."""
    for start in range(0, length, TILE):
        yield slice(start, min(start + TILE, length))


def window(band_NWH: Tensor, tile: slice, length: int) -> Tensor:
    """Of a band, the offsets that a tile has to all of `length` tokens, [N, length + C − 1, H]."""
    first = (band_NWH.shape[1] + 1) // 2 - tile.stop
    return band_NWH[:, first : first + length + tile.stop - tile.start - 1]


def skewed(products_NCW: Tensor, length: int) -> Tensor:
    """View [N, C, length] of contiguous products [N, C, length + C − 1]: row t begins at its column C − 1 − t."""
    num_heads, height, width = products_NCW.shape
    first = products_NCW.storage_offset() + height - 1
    return products_NCW.as_strided((num_heads, height, length), (height * width, width - 1, 1), first)


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
    d_scores_NST: Tensor, x_NSH: Tensor, band_NWH: Tensor | None, d_x_NSH: Tensor, d_band_NWH: Tensor | None
) -> None:
    """Add the gradients of both factors of `put_products`."""
    if band_NWH is None or d_band_NWH is None:
        return
    num_heads, length, _ = x_NSH.shape
    d_products_NCW = x_NSH.new_empty(0, 0, 0)
    for tile in tiles(length):
        height = tile.stop - tile.start
        if d_products_NCW.shape[1] != height:  # zero beside the view, and stays so
            d_products_NCW = x_NSH.new_zeros(num_heads, height, length + height - 1)
        skewed(d_products_NCW, length).copy_(d_scores_NST[:, tile])
        d_x_NSH[:, tile].baddbmm_(d_products_NCW, window(band_NWH, tile, length))
        window(d_band_NWH, tile, length).baddbmm_(d_products_NCW.transpose(1, 2), x_NSH[:, tile])


def normalized(scores_NST: Tensor, blocked_ST: Tensor | None) -> Tensor:
    """Softmax over the keys that a query sees, in place; zeros for a query that sees none."""
    if blocked_ST is None:
        return torch.softmax(scores_NST, -1, out=scores_NST)
    scores_NST.masked_fill_(blocked_ST, torch.finfo(scores_NST.dtype).min)
    return torch.softmax(scores_NST, -1, out=scores_NST).masked_fill_(blocked_ST, 0.0)


def dropped(x_NST: Tensor, stays_NST: Tensor | None) -> Tensor:
    """`x` where it stays and zeros elsewhere, not yet scaled.

    Products of one type take a third of the time of those with bool.
    """
    return x_NST if stays_NST is None else x_NST * stays_NST.to(x_NST.dtype)
