"""The texts of files as batches of tokens: records are read in order, tokenised by worker processes, given in order.

The batches do not depend on the number of workers: the work is cut by the input alone. At most a few batches per worker
are under way, so memory stays bounded whatever the size of the corpus.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deberta_xl.base.errors import DataError
from deberta_xl.base.interruption import held_back
from deberta_xl.corpus.characters import UnknownCharacters
from deberta_xl.corpus.documents import Record, is_held_out
from deberta_xl.corpus.reading import BadRecord, TextFile, texts_of
from deberta_xl.data.text_rules import TextRules
from deberta_xl.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, Tokenizer
from deberta_xl.data.words import WordLengths, word_lengths

BATCH_BYTES, BATCH_RECORDS = 2**20, 4096
"""Bytes of text, and number of records, after which a batch is handed to a worker."""
BATCHES_PER_WORKER = 3
"""Batches under way per worker."""


class RecordBatch(NamedTuple):
    """A part of one file, for one worker."""

    path: Path
    kind: str
    records: list[Record]
    num_bytes: int
    """Bytes read from the disk since the last batch."""


class TokenBatch(NamedTuple):
    """A tokenised batch; documents back to back, without the empty ones."""

    ids: np.ndarray
    lengths: np.ndarray
    is_held_out: np.ndarray
    """bool `[documents]`: goes to the held-out dataset."""
    counts: Counter
    words: WordLengths
    unknown_characters: Counter[str]
    bad: list[str]
    num_bytes: int


class BatchTokenizer:
    """Turns record batches into token batches; one lives in every worker."""

    def __init__(self, tokenizer: Tokenizer, json_key: str, valid_share: float, documents: str = "blank_lines"):
        self.tokenizer = tokenizer
        self.json_key = json_key
        self.valid_share = valid_share
        self.documents = documents
        self.unknown = UnknownCharacters(tokenizer)

    def __call__(self, batch: RecordBatch) -> TokenBatch:
        """Decode, tokenise and count one batch."""
        texts, bad = [], []
        for record in batch.records:
            try:
                texts += texts_of(record, batch.kind, self.json_key, self.documents)
            except BadRecord as reason:
                bad.append(f"{batch.path}:{record.line}: {reason}")
        documents = self.tokenizer.encode_batch(texts)
        filled = [number for number, ids in enumerate(documents) if ids.size]
        ids = np.concatenate([documents[n] for n in filled]) if filled else np.zeros(0, np.int32)
        counts = Counter(
            unknown=int(np.count_nonzero(ids == self.tokenizer.unk_id)),
            empty=len(documents) - len(filled),
            lines=sum(text.count("\n") + 1 for text in texts),
            literal=sum(text.count(piece) for text in texts for piece in (*SPECIAL_PIECES, MASK_PIECE)),
        )
        lengths = np.array([documents[n].size for n in filled], np.int64)
        return TokenBatch(
            ids,
            lengths,
            np.array([is_held_out(texts[n], self.valid_share) for n in filled], bool),
            counts,
            word_lengths(self.tokenizer.word_flags[ids], lengths),
            self.unknown.count(texts[n] for n in filled if self.tokenizer.unk_id in documents[n]),
            bad,
            batch.num_bytes,
        )


def read_batches(paths: Sequence[Path], documents: str, inputs: list[dict[str, Any]]) -> Iterator[RecordBatch]:
    """The records of the files in batches; notes each file in `inputs` when it is done."""
    for path in paths:
        with TextFile(path, documents) as file:
            seen = 0
            for records in batched(file.records()):
                yield RecordBatch(path, file.kind, records, file.num_bytes - seen)
                seen = file.num_bytes
            inputs.append(file.summary())


def batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Runs of records of about BATCH_BYTES together."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data or b"")
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(batches: Iterable[RecordBatch], work: BatchTokenizer, workers: int) -> Iterator[TokenBatch]:
    """`work` of each batch, in order, by `workers` processes (in this one when there is only one)."""
    if workers <= 1:
        yield from map(work, batches)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, set_up_worker, worker_arguments(work)) as pool:
        under_way: deque[concurrent.futures.Future[TokenBatch]] = deque()
        try:
            for batch in batches:
                with held_back():
                    under_way.append(pool.submit(work_in_worker, batch))
                if len(under_way) >= BATCHES_PER_WORKER * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError("a worker process was killed (out of memory?); try fewer --workers") from error
        except BaseException:  # an interruption, too: what is under way is wanted no more
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def worker_arguments(work: BatchTokenizer) -> tuple[bytes, int, TextRules, str, float, str]:
    """What a worker needs to build its own BatchTokenizer."""
    tokenizer = work.tokenizer
    rules = (work.json_key, work.valid_share, work.documents)
    return tokenizer.spm_model, tokenizer.vocab_size, tokenizer.rules, *rules


#: The worker process's own BatchTokenizer; unset in the main process.
work_here: BatchTokenizer


def set_up_worker(
    spm_model: bytes, vocab_size: int, rules: TextRules, json_key: str, valid_share: float, documents: str
) -> None:
    """Build the worker's BatchTokenizer once; never outlive the main process."""
    global work_here
    threading.Thread(target=leave_with_parent, daemon=True).start()
    work_here = BatchTokenizer(Tokenizer(spm_model, vocab_size, rules=rules), json_key, valid_share, documents)


def leave_with_parent() -> None:
    """End this process when its parent has ended, however that happened."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work_in_worker(batch: RecordBatch) -> TokenBatch:
    """Tokenise one batch in a worker process."""
    return work_here(batch)
