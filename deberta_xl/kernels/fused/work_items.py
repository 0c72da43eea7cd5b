"""Documents of a micro-batch as work for a kernel: a list of their blocks, made on the device.

Dense rows, padded ones, rows packed of documents, and a flat sequence of them are all the same: documents that begin
somewhere and have a length. Nothing here is read by the host, and nothing is laid out by rows: what a kernel computes
for a document does not depend on where the document lies.

Shape suffixes of this file:
    B batch   T positions   L all positions, row by row   K entries of a work item   M chosen queries
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ENTRIES = 8
"""Integers of a work item: (position in the batch of its document's first token, position of the block in the document,
the document's length, that of its prefix, its number, number of its first item, whether padding is among its tokens,
bits of the block's tokens)."""
MAX_BLOCK = 64
"""As many bits as an integer has."""


class WorkItems(NamedTuple):
    """The blocks of all documents."""

    table_LK: Tensor
    """int64; the first `count` ones are filled: document by document, and by position in each."""
    count: Tensor
    """int32 [1]."""
    query_row_L: Tensor
    """Row of the queries' tensors that has the position's query, int32; −1 where none has, and at padding."""


def work_items(segments_BT: Tensor, open_BT: Tensor | None, position_BM: Tensor | None, block: int) -> WorkItems:
    """The documents' blocks of `block` positions.

    A document ends with its last token; padding within one belongs to it, as a place where nothing is. Without
    `open_BT` every key is in the prefix: it is seen from everywhere.
    """
    assert block <= MAX_BLOCK
    is_token_BT = segments_BT != 0
    position_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    is_first_BT = is_first_token(segments_BT)
    start_BT = torch.where(is_first_BT, position_T, -1).cummax(1).values
    number_L = is_first_BT.view(-1).cumsum(0) - 1
    length_BT = reach_in_document(is_token_BT, number_L) - start_BT
    prefix_BT = length_BT
    if open_BT is not None:
        prefix_BT = (reach_in_document(is_token_BT & open_BT, number_L) - start_BT).clamp(min=0)
    inside_BT = position_T - start_BT
    is_item_BT = (start_BT >= 0) & (inside_BT % block == 0) & (inside_BT < length_BT)
    row_B1 = torch.arange(len(segments_BT), device=segments_BT.device).unsqueeze(1)
    start_in_batch_BT = start_BT + row_B1 * len(position_T)
    item_L = is_item_BT.view(-1).cumsum(0) - 1
    first_item_BT = item_L.view_as(start_BT) - inside_BT // block
    has_holes_BT = count_in_document(is_token_BT, number_L) != length_BT
    number_BT = number_L.view_as(start_BT)
    entries = [start_in_batch_BT, inside_BT, length_BT, prefix_BT, number_BT, first_item_BT, has_holes_BT]
    table_LK = item_L.new_zeros(len(item_L) + 1, ENTRIES)
    # What is no item goes to a last row, which is cut off; bits of what is no token are 0, wherever they go.
    row_L = torch.where(is_item_BT.view(-1), item_L, len(item_L))
    table_LK[row_L, : len(entries)] = torch.stack([entry.reshape(-1) for entry in entries], 1)
    bits_L = (is_token_BT.long() << inside_BT % block).view(-1)
    table_LK[:, len(entries)].scatter_add_(0, item_L.clamp(min=0), bits_L)
    query_row_L = rows_of_queries(is_token_BT, position_BM).view(-1)
    return WorkItems(table_LK[:-1], (item_L[-1:] + 1).to(torch.int32), query_row_L)


def is_first_token(segments_BT: Tensor) -> Tensor:
    """Whether a document begins, bool: the number is another one than that of the last token before."""
    position_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    is_token_BT = segments_BT != 0
    last_BT = torch.where(is_token_BT, position_T, -1).cummax(1).values
    filled_BT = segments_BT.gather(1, last_BT.clamp(min=0)) * (last_BT >= 0)
    return is_token_BT & (filled_BT != F.pad(filled_BT[:, :-1], (1, 0)))


def reach_in_document(is_counted_BT: Tensor, number_L: Tensor) -> Tensor:
    """For each position, one more than the last position of its document that is counted; 0 where none is."""
    position_T = torch.arange(1, is_counted_BT.shape[1] + 1, device=number_L.device)
    number_L = number_L.clamp(min=0)  # padding before any document counts nothing
    counted_L = (position_T * is_counted_BT).view(-1)
    last_L = torch.zeros_like(number_L).scatter_reduce(0, number_L, counted_L, "amax")
    return last_L[number_L].view_as(is_counted_BT)


def count_in_document(is_counted_BT: Tensor, number_L: Tensor) -> Tensor:
    """For each position, how many of its document's are counted."""
    number_L = number_L.clamp(min=0)
    count_L = torch.zeros_like(number_L).scatter_add(0, number_L, is_counted_BT.view(-1).long())
    return count_L[number_L].view_as(is_counted_BT)


def rows_of_queries(is_token_BT: Tensor, position_BM: Tensor | None) -> Tensor:
    """Where each position's query is, int32 [B, T]; −1 where it is not.

    Of several slots of `position_BM` with one position the first has it: the others fill up the choice.
    """
    if position_BM is None:
        row_BT = torch.arange(is_token_BT.numel(), device=is_token_BT.device).view_as(is_token_BT)
    else:
        num_slots = position_BM.shape[1]
        slot_BM = torch.arange(position_BM.numel(), device=position_BM.device).view_as(position_BM)
        none = len(position_BM) * num_slots
        row_BT = slot_BM.new_full(is_token_BT.shape, none).scatter_reduce(1, position_BM, slot_BM, "amin")
        row_BT = torch.where(row_BT < none, row_BT, -1)
    return torch.where(is_token_BT, row_BT, -1).to(torch.int32)
