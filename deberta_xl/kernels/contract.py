"""What a kernel is given: queries, memory, projected relative rows, where everything stands, and a rule of dropout.

Nothing dense over pairs of tokens is in it, but for a mask that a caller has brought as such. A kernel that works on
dense matrices asks `where` for them; another one reads segments and positions.

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   M chosen queries   N heads on this rank   H head size   R relative rows (2k)
    W window of a convolution
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.kernels.dropout import DropoutRule, Places
from deberta_xl.kernels.relative_index import Buckets, relative_index, rows_in_reach


class Memory(NamedTuple):
    """Keys and values of a sequence, computed once and attended to any number of times."""

    key_BNTH: Tensor
    value_BNTH: Tensor


class RelativeRows(NamedTuple):
    """The relative table as the heads project it; rows that no pair falls into (`Where.relative_rows`) may be zeros."""

    key_NRH: Tensor | None = None
    """None where content-to-position is not used."""
    query_NRH: Tensor | None = None
    """None where position-to-content is not used."""


class Documents(NamedTuple):
    """Which document each token belongs to, int64 [B, T] each. A document is a run of one segment number; where a mask
    of pairs says what sees what, it is a row. At padding the numbers mean nothing."""

    number_BT: Tensor
    """0, 1, … row by row."""
    start_BT: Tensor
    """Position in the row of the document's first token."""


class Span(NamedTuple):
    """Where a document stands."""

    row: int
    start: int
    length: int
    segment: int
    """Its number in `Where.segments_BT`."""


@dataclass(frozen=True, eq=False)
class Where:
    """Where queries and keys stand, and so which sees which. All layers of a pass are given the same one.

    What else may decide that would be a field here, and in the registry's `Demand`, for a kernel to refuse it there.
    """

    segments_BT: Tensor
    """Number of the document each key belongs to, 0 at padding: a query sees the keys of its own document."""
    buckets: Buckets
    mask_BST: Tensor | None = None
    """Which keys every position sees (bool), where that does not follow from the documents."""
    open_BT: Tensor | None = None
    """Which keys (bool) are seen from everywhere in their document; the others from themselves on only, j ≤ i. All
    False is a causal mask; True in a document's prefix, and only there, that of a prefix language model. None: every
    key is open."""
    position_BM: Tensor | None = None
    """Positions of the queries in the sequence; None where every position is a query, in order."""

    def of_queries(self, position_BM: Tensor) -> Where:
        """The same, of chosen queries among all."""
        assert self.position_BM is None, "queries are chosen once"
        return replace(self, position_BM=position_BM)

    @cached_property
    def delta(self) -> Tensor:
        """Row of the relative table for every pair, int64 [S, T] (Toeplitz: of i − j alone) or, of chosen queries,
        [B, M, T]. Made when a kernel first asks, and kept for the other layers."""
        delta_ST = relative_index(self.segments_BT.shape[1], self.buckets, self.segments_BT.device)
        return delta_ST if self.position_BM is None else delta_ST[self.position_BM]

    @cached_property
    def blocked_BST(self) -> Tensor:
        """Which keys a query does not see, bool; made when a kernel first asks, and kept for the other layers."""
        if self.mask_BST is not None:
            return ~self.rows_of_queries(self.mask_BST)
        query_segments_BS = self.segments_BT
        if self.position_BM is not None:
            query_segments_BS = self.segments_BT.gather(1, self.position_BM)
        is_other_BST = query_segments_BS.unsqueeze(2) != self.segments_BT.unsqueeze(1)
        blocked_BST = is_other_BST | (self.segments_BT == 0).unsqueeze(1)
        if self.open_BT is None:
            return blocked_BST
        key_T = torch.arange(self.segments_BT.shape[1], device=self.segments_BT.device)
        query_BS = key_T if self.position_BM is None else self.position_BM
        return blocked_BST | ((key_T > query_BS.unsqueeze(-1)) & ~self.open_BT.unsqueeze(1))

    def sees_neighbours(self, window: int) -> Tensor:
        """Which of the `window` positions around it each position sees, itself in the middle, bool [B, S, W].

        By the rule of the documents and of `open_BT`, as attention; a mask of pairs does not say.
        """
        reach = window // 2
        neighbour_BSW = F.pad(self.segments_BT, (reach, reach)).unfold(1, window, 1)
        is_seen_BSW = neighbour_BSW == self.segments_BT.unsqueeze(-1)
        if self.open_BT is None:
            return is_seen_BSW
        is_open_BSW = F.pad(self.open_BT, (reach, reach)).unfold(1, window, 1)
        return is_seen_BSW & (is_open_BSW | (torch.arange(window, device=is_open_BSW.device) <= reach))

    @cached_property
    def documents(self) -> Documents:
        """The documents of the micro-batch, of every token; made without a look at what is in them."""
        num_rows, length = self.segments_BT.shape
        device = self.segments_BT.device
        key_T = torch.arange(length, device=device)
        if self.mask_BST is not None:  # whole rows
            number_BT = torch.arange(num_rows, device=device).unsqueeze(1).expand(-1, length)
            return Documents(number_BT, torch.zeros_like(number_BT))
        is_start_BT = self.segments_BT != F.pad(self.segments_BT, (1, -1))
        is_start_BT &= self.segments_BT > 0
        number_BT = is_start_BT.flatten().cumsum(0).view(num_rows, length) - 1
        return Documents(number_BT, (is_start_BT * key_T).cummax(1).values)

    @cached_property
    def spans(self) -> list[Span]:
        """The documents of the micro-batch, in their order; a GPU is waited for, once."""
        num_rows, length = self.segments_BT.shape
        is_bound_BT = self.segments_BT != F.pad(self.segments_BT, (1, -1))
        bounds = torch.cat([is_bound_BT.nonzero(), self.segments_BT[is_bound_BT].unsqueeze(1)], dim=1).tolist()
        spans = []
        for (row, start, segment), (next_row, next_start, _) in pairwise([*bounds, (num_rows, 0, 0)]):
            end = next_start if next_row == row else length
            if segment:
                spans.append(Span(row, start, end - start, segment))
        return spans

    @cached_property
    def relative_rows(self) -> slice:
        """The rows of the relative table that a pair may fall into: those of the longest document. On a GPU, which
        would have to be waited for, and under a mask of pairs: those of a whole row."""
        length = self.segments_BT.shape[1]
        if self.mask_BST is None and self.segments_BT.device.type == "cpu":
            length = max((span.length for span in self.spans), default=1)
        return rows_in_reach(length, self.buckets)

    @cached_property
    def notes(self) -> dict[str, Any]:
        """By its name, what a kernel derives from all this for every layer."""
        return {}

    @cached_property
    def places(self) -> Places:
        """Where the queries stand in their documents, for dropout of their pairs."""
        number_BT, start_BT = self.documents
        position_BT = torch.arange(number_BT.shape[1], device=number_BT.device) - start_BT
        if self.position_BM is None:
            return Places(number_BT, position_BT, start_BT)
        return Places(*(of_token.gather(1, self.position_BM) for of_token in (number_BT, position_BT, start_BT)))

    def rows_of_queries(self, dense_BST: Tensor) -> Tensor:
        """Of a matrix of all pairs, the rows of the queries."""
        if self.position_BM is None:
            return dense_BST
        return dense_BST.gather(1, self.position_BM.unsqueeze(-1).expand(-1, -1, dense_BST.shape[-1]))


class Attend(Protocol):
    """A kernel's function `attention`."""

    def __call__(
        self, query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule
    ) -> Tensor:
        """The context [B, N, S, H] of every query, by eq. (4); zeros for a query that sees no key.

        Scores and softmax are computed in float32 or better, as the original does.
        """
