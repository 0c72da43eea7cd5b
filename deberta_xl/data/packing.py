"""Packing documents into rows of full length by arithmetic alone: no index table, nothing to build or to store.

Think of the documents as one stream in which each joint between two takes two slots, the [SEP] of the one and the
[CLS] of the next:

    document 0  [SEP][CLS]  document 1  [SEP][CLS]  document 2 …

Row r shows the slots r·(S−2) … (r+1)·(S−2) − 1 between a [CLS] and a [SEP] of its own. Where a row's edge falls on a
joint, the joint's slots say nothing new and are left out; the row is padded at its end instead (by at most four).
So every piece of a document in a row is exactly [CLS] tokens [SEP], and every token of the corpus stands in one row.
"""

from __future__ import annotations

import numpy as np

from deberta_xl.data.token_store import TokenStore

# Shapes: B rows asked for, S sequence_length, P pieces of documents in these rows.


class PackedRows:
    """The documents of a store as rows of `sequence_length` tokens; `len()` is their number.

    Memory: none per row or document (the positions are found by bisection in the mapped index).
    """

    def __init__(self, store: TokenStore, sequence_length: int, *, cls_id: int, sep_id: int, pad_id: int):
        if sequence_length < 5:
            raise ValueError(f"sequence_length={sequence_length} leaves no room for documents; choose at least 5")
        self.store = store
        self.sequence_length = sequence_length
        self.capacity = sequence_length - 2
        self.cls_id, self.sep_id, self.pad_id = cls_id, sep_id, pad_id
        self.offsets = store.nonempty_offsets()
        self.num_documents = len(self.offsets)
        self.num_slots = store.num_tokens + 2 * (self.num_documents - 1)

    def __len__(self) -> int:
        return -(-self.num_slots // self.capacity)

    def document_start(self, documents: np.ndarray) -> np.ndarray:
        """The slot of each document's first token; for the number of documents, two behind the last slot."""
        offsets = self.offsets[np.minimum(documents, self.num_documents - 1)] // self.store.header.dtype.itemsize
        return np.where(documents < self.num_documents, offsets, self.store.num_tokens) + 2 * documents

    def document_at(self, slots: np.ndarray) -> np.ndarray:
        """The last document that starts at or before each slot, by bisection (the index is not read as a whole)."""
        low, high = np.zeros_like(slots), np.full_like(slots, self.num_documents)
        while np.any(high - low > 1):
            middle = (low + high) // 2
            starts_before = self.document_start(middle) <= slots
            low, high = np.where(starts_before, middle, low), np.where(starts_before, high, middle)
        return low

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `segments` of the rows `indices` `[B]`, int64 `[B, S]` each.

        `segments`: 0 = padding, n = n-th piece of the row, its [CLS] and [SEP] included.
        """
        begin_B, end_B, first_B, last_B = self.windows(np.asarray(indices, np.int64))
        pieces_B = last_B - first_B + 1
        row_P = np.repeat(np.arange(len(pieces_B)), pieces_B)
        document_P = np.arange(row_P.size) + np.repeat(first_B - np.cumsum(pieces_B) + pieces_B, pieces_B)
        start_P = np.maximum(self.document_start(document_P), begin_B[row_P])
        stop_P = np.minimum(self.document_start(document_P + 1) - 2, end_B[row_P])
        # A piece of the slots start … stop − 1 has its [CLS] one column before the first token, which is 1 + slot.
        shape = len(pieces_B), self.sequence_length
        is_cls, is_sep = np.zeros(shape, bool), np.zeros(shape, bool)
        is_cls[row_P, start_P - begin_B[row_P]] = True
        is_sep[row_P, stop_P - begin_B[row_P] + 1] = True
        is_used = np.arange(self.sequence_length) < (end_B - begin_B + 2)[:, None]
        input_ids = np.full(shape, self.pad_id, np.int64)
        input_ids[is_used & ~is_cls & ~is_sep] = self.tokens(begin_B - 2 * first_B, end_B - 2 * last_B)
        input_ids[is_cls] = self.cls_id
        input_ids[is_sep] = self.sep_id
        return input_ids, np.cumsum(is_cls, axis=1) * is_used

    def windows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """First slot and the one behind the last, first and last document of each row, int64 `[B]` each.

        Slots of joints at the edges are left out. A row of at least three slots always keeps a token.
        """
        outside = (indices < 0) | (indices >= len(self))
        if np.any(outside):
            raise IndexError(f"row {indices[outside][0]} of {self.store.prefix}, which has {len(self)}")
        begin = indices * self.capacity
        end = np.minimum(begin + self.capacity, self.num_slots)
        first, last = self.document_at(np.stack([begin, end - 1]))
        begins_in_joint = begin >= self.document_start(first + 1) - 2
        first = first + begins_in_joint
        begin = np.where(begins_in_joint, self.document_start(first), begin)
        return begin, np.minimum(end, self.document_start(last + 1) - 2), first, last

    def tokens(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The ids of ranges of the store's token stream, one behind the other."""
        ranges = zip(starts.tolist(), stops.tolist(), strict=True)
        return np.concatenate([self.store.read_stream(start, stop) for start, stop in ranges])
