"""Disentangled attention without a gather of pairs, document by document, with a backward pass of its own.

Position products stand where the scores do (`bands.py`). For the backward pass the probabilities are kept, and what
dropout leaves of them as one byte each; nothing else grows with the square of the length.

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   M chosen queries   N heads on this rank   H head size   R relative rows (2k)
    W offsets
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deberta_xl.kernels import reference
from deberta_xl.kernels.bands import Bands, add_position_gradients, laid_out, scores
from deberta_xl.kernels.contract import Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule, Places, keep_pair_rows, pair_rows
from deberta_xl.kernels.relative_index import offset_rows


class Chosen(NamedTuple):
    """Of a block, the queries that are asked for."""

    slot_S: Tensor
    """Their numbers among those of the row, M."""
    position_S: Tensor
    """Where they stand in the block."""


class Block(NamedTuple):
    """Queries and keys of one row that are attended among themselves: a document; or a row, under a mask."""

    row: int
    tokens: slice
    blocked_ST: Tensor | None = None
    """Which pairs do not see each other (bool); None where all do."""
    chosen: Chosen | None = None
    """None where all tokens are queries, in order."""
    start_1S: Tensor | None = None
    """For dropout, where documents start that are not of one piece; None where the block is one."""

    @property
    def length(self) -> int:
        """Keys."""
        return self.tokens.stop - self.tokens.start

    @property
    def num_queries(self) -> int:
        """Of the block."""
        return self.length if self.chosen is None else len(self.chosen.slot_S)

    @property
    def position_S(self) -> Tensor | None:
        """Of chosen queries, in the block."""
        return None if self.chosen is None else self.chosen.position_S

    def keys(self, x_BNTH: Tensor) -> Tensor:
        """The block of keys or values, or of room for them, [N, T, H]."""
        return x_BNTH[self.row, :, self.tokens]

    def queries(self, x_BNSH: Tensor) -> Tensor:
        """The block of queries, or of room for them, [N, S, H]; of chosen ones a copy."""
        return self.keys(x_BNSH) if self.chosen is None else x_BNSH[self.row].index_select(1, self.chosen.slot_S)

    def stays(self, first_BNS: Tensor, stride_BNS: Tensor, dropout: DropoutRule) -> Tensor:
        """Which pairs dropout leaves, of what `pair_rows` gives, [N, S, T]."""
        rows_1NS = [self.queries(x_BNS.unsqueeze(-1)).squeeze(-1).unsqueeze(0) for x_BNS in (first_BNS, stride_BNS)]
        return keep_pair_rows(*rows_1NS, self.start_1S, self.length, dropout)[0]

    def put_back(self, room_BNSH: Tensor, x_NSH: Tensor) -> None:
        """What has been written to `queries(room)` is in the room, too."""
        if self.chosen is not None:
            room_BNSH[self.row].index_copy_(1, self.chosen.slot_S, x_NSH)


def attention(query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Tensor:
    """The contract's `Attend`.

    One query of each row, as generation has it at each step, is the reference's business: no matrix of pairs comes of
    it, and the table would be laid out for the one.
    """
    if query_BNSH.shape[2] == 1:
        return reference.attention(query_BNSH, memory, relative, where, dropout)
    dtype = query_BNSH.dtype
    score_dtype = torch.promote_types(dtype, torch.float32)
    if __name__ not in where.notes:
        where.notes[__name__] = list(blocks_of(where))
    blocks: list[Block] = where.notes[__name__]
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
    if dropout.rate:
        dropout = dropout.with_seed()
    return Strided.apply(*inputs, blocks, where.places, dropout, is_kept).to(dtype)


def blocks_of(where: Where) -> Iterator[Block]:
    """The documents of a micro-batch that have queries; its rows, where a mask of pairs is given or a document is not
    of one piece."""
    spans, position_BM = where.spans, where.position_BM
    device = where.segments_BT.device
    if where.mask_BST is not None or len({(span.row, span.segment) for span in spans}) < len(spans):
        length = where.segments_BT.shape[1]
        for row, blocked_ST in enumerate(where.blocked_BST):
            chosen = None
            if position_BM is not None:
                chosen = Chosen(torch.arange(len(blocked_ST), device=device), position_BM[row])
            yield Block(row, slice(0, length), blocked_ST, chosen, where.places.start[row : row + 1])
        return
    for row, start, length, _ in spans:
        tokens = slice(start, start + length)
        key_T = position_S = torch.arange(length, device=device)
        chosen = None
        if position_BM is not None:
            place_M = position_BM[row] - start
            picked = ((place_M >= 0) & (place_M < length)).nonzero().squeeze(1)
            if not len(picked):
                continue
            position_S = place_M[picked]
            chosen = Chosen(picked, position_S)
        blocked_ST = None
        if where.open_BT is not None:
            blocked_ST = (key_T > position_S.unsqueeze(1)) & ~where.open_BT[row, tokens]
        yield Block(row, tokens, blocked_ST, chosen)


class Heads(NamedTuple):
    """Queries, keys and values; or room for their gradients."""

    query_BNSH: Tensor
    key_BNTH: Tensor
    value_BNTH: Tensor


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
        places: Places,
        dropout: DropoutRule,
        is_kept: bool,
    ) -> Tensor:
        """The context of all blocks, zeros elsewhere. What the backward pass needs is kept if it `is_kept`."""
        heads, bands = Heads(query_BNSH, key_BNTH, value_BNTH), Bands(key_band_NWH, query_band_NWH)
        context_BNSH = room_like(query_BNSH, sum(block.num_queries for block in blocks))
        pair_rows_BNS = pair_rows(places, query_BNSH.shape[1], dropout) if dropout.rate else None
        kept = []
        for block in blocks:
            stays_NST = None if pair_rows_BNS is None else block.stays(*pair_rows_BNS, dropout)
            weights_NST = attend_block(block, heads, bands, stays_NST, context_BNSH)
            if is_kept:
                kept += [weights_NST, stays_NST]
            del weights_NST, stays_NST  # before the next ones are made
        if dropout.rate:
            context_BNSH.mul_(dropout.scale)
        ctx.save_for_backward(*heads, *bands, *kept)
        ctx.blocks, ctx.scale = blocks, dropout.scale
        return context_BNSH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BNSH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, values and both bands."""
        saved = ctx.saved_tensors  # once: what is recomputed may be taken but once
        heads, bands, kept = Heads(*saved[:3]), Bands(*saved[3:5]), saved[5:]
        counts = [
            sum(numbers) for numbers in zip(*((b.num_queries, b.length, b.length) for b in ctx.blocks), strict=True)
        ]
        d_heads = Heads(*map(room_like, heads, counts or [0] * 3))
        d_bands = Bands(*(None if band is None else torch.zeros_like(band) for band in bands))
        if ctx.scale != 1:
            gradient_BNSH = gradient_BNSH * ctx.scale
        for block, weights_NST, stays_NST in zip(ctx.blocks, kept[::2], kept[1::2], strict=True):
            d_NST = score_gradients(block, gradient_BNSH, heads, weights_NST, stays_NST, d_heads)
            add_score_gradients(block, d_NST, heads, bands, d_heads, d_bands)
            del d_NST
        return *d_heads, *d_bands, None, None, None, None


def attend_block(block: Block, heads: Heads, bands: Bands, stays_NST: Tensor | None, context_BNSH: Tensor) -> Tensor:
    """Put a block's context where it belongs, not yet scaled for dropout; the probabilities, [N, S, T]."""
    query, key = block.queries(heads.query_BNSH), block.keys(heads.key_BNTH)
    weights_NST = normalized(scores(query, key, bands, block.position_S), block.blocked_ST)
    context = block.queries(context_BNSH)
    torch.bmm(dropped(weights_NST, stays_NST), block.keys(heads.value_BNTH), out=context)
    block.put_back(context_BNSH, context)
    return weights_NST


def score_gradients(
    block: Block,
    gradient_BNSH: Tensor,
    heads: Heads,
    weights_NST: Tensor,
    stays_NST: Tensor | None,
    d_heads: Heads,
) -> Tensor:
    """The gradient of a block's scores, [N, S, T]; that of its values is put where it belongs."""
    gradient = block.queries(gradient_BNSH)
    d_value = block.keys(d_heads.value_BNTH)
    torch.bmm(dropped(weights_NST, stays_NST).transpose(1, 2), gradient, out=d_value)
    d_NST = dropped(gradient @ block.keys(heads.value_BNTH).transpose(1, 2), stays_NST)
    return torch.ops.aten._softmax_backward_data.out(d_NST, weights_NST, -1, d_NST.dtype, grad_input=d_NST)


def add_score_gradients(
    block: Block, d_NST: Tensor, heads: Heads, bands: Bands, d_heads: Heads, d_bands: Bands
) -> None:
    """What a block's scores are made of has its gradients."""
    of_block = (block.queries(heads.query_BNSH), block.keys(heads.key_BNTH))
    d_query, d_key = block.queries(d_heads.query_BNSH), block.keys(d_heads.key_BNTH)
    torch.bmm(d_NST, of_block[1], out=d_query)
    torch.bmm(d_NST.transpose(1, 2), of_block[0], out=d_key)
    add_position_gradients(d_NST, of_block, (d_query, d_key), bands, d_bands, block.position_S)
    block.put_back(d_heads.query_BNSH, d_query)


def room_like(x_BNSH: Tensor, num_covered: int) -> Tensor:
    """Room for as many tokens of all rows, zeros for the others, [B, N, S, H]; a token's heads lie side by side, as
    layers have them."""
    shape = x_BNSH.transpose(1, 2).shape
    room_BSNH = x_BNSH.new_empty(shape) if num_covered == shape[:2].numel() else x_BNSH.new_zeros(shape)
    return room_BSNH.transpose(1, 2)


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
    return x_NST if stays_NST is None else stays_NST.to(x_NST.dtype).mul_(x_NST)
