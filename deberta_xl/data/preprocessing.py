"""From text files to a dataset: records are read in order, tokenised by worker processes, written in order.

The output does not depend on the number of workers: the work is cut by the input alone. At most a few batches per
worker are under way, so memory stays bounded whatever the size of the corpus.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deberta_xl.data.characters import UnknownCharacters
from deberta_xl.data.corpus import BadRecord, TextFile, texts_of
from deberta_xl.data.documents import PART_CHARACTERS, Record
from deberta_xl.data.errors import CorpusError, DataError
from deberta_xl.data.text_rules import TextRules
from deberta_xl.data.token_store_writer import TokenStoreWriter
from deberta_xl.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, Tokenizer
from deberta_xl.data.words import WordLengths, word_lengths
from deberta_xl.errors import counted
from deberta_xl.interruption import held_back

#: Bytes of text, and number of records, after which a batch is handed to a worker.
BATCH_BYTES = 2**20
BATCH_RECORDS = 4096
#: Batches under way per worker.
BATCHES_PER_WORKER = 3
#: Bad records that are described; the rest is only counted.
MAX_REPORTED = 10


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


@dataclass
class Summary:
    """What became of the input."""

    documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    held_out_documents: int = 0
    held_out_tokens: int = 0
    empty_documents: int = 0
    bad_records: int = 0
    lines: int = 0
    """Lines of the documents, blank ones aside."""
    literal_specials: int = 0
    """Times that the text itself says [CLS], [MASK], …: kept as ordinary text."""
    words: WordLengths = field(default_factory=WordLengths)
    """Of the words that are masked."""
    unknown_characters: Counter[str] = field(default_factory=Counter)
    """Those that have become [UNK], with their counts."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)
    """`file:line: reason` of the first bad records."""

    def add(self, batch: TokenBatch) -> None:
        """Count one batch."""
        self.documents += len(batch.lengths)
        self.tokens += len(batch.ids)
        self.held_out_documents += int(batch.is_held_out.sum())
        self.held_out_tokens += int(batch.lengths[batch.is_held_out].sum())
        self.unknown_tokens += batch.counts["unknown"]
        self.empty_documents += batch.counts["empty"]
        self.lines += batch.counts["lines"]
        self.literal_specials += batch.counts["literal"]
        self.words = self.words.plus(batch.words)
        self.unknown_characters += batch.unknown_characters
        self.bad_records += len(batch.bad)
        self.reported += batch.bad[: MAX_REPORTED - len(self.reported)]


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


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out dataset: decided by a hash of its text, so copies stay together."""
    if not share:
        return False
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def read_batches(paths: Sequence[Path], documents: str, summary: Summary) -> Iterator[RecordBatch]:
    """The records of the files in batches; notes each file in `summary.inputs` when it is done."""
    for path in paths:
        with TextFile(path, documents) as file:
            seen = 0
            for records in batched(file.records()):
                yield RecordBatch(path, file.kind, records, file.num_bytes - seen)
                seen = file.num_bytes
            summary.inputs.append(file.summary())


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


@dataclass(frozen=True)
class Preprocessing:
    """What is to become of text, whoever reads it."""

    tokenizer: Tokenizer
    output: str | Path
    """Prefix of the dataset."""
    valid_output: str | Path | None = None
    """Prefix of the held-out dataset; none when unset."""
    valid_share: float = 0.0
    """Share of the documents that go there."""
    json_key: str = "text"
    documents: str = "blank_lines"
    """Where a document of a text ends, one of DOCUMENTS."""
    workers: int = 1
    """Processes that tokenise."""
    strict: bool = False
    """End at the first bad record."""
    overwrite: bool = False
    advance: Callable[[int, str], None] = lambda num_bytes, note: None
    """Called with the bytes of input just done and a note."""

    def open_writers(self, stack: contextlib.ExitStack) -> list[TokenStoreWriter]:
        """Writers of the datasets; `stack` removes what they have written unless they are finished."""
        outputs = [self.output] if self.valid_output is None else [self.output, self.valid_output]
        options = {"tokenizer": self.tokenizer, "overwrite": self.overwrite}
        return [stack.enter_context(TokenStoreWriter(output, **options)) for output in outputs]

    def token_batches(self, paths: Sequence[Path], summary: Summary, of: str = "") -> Iterator[TokenBatch]:
        """The files' documents, tokenised, in order; counted in `summary` and told to `advance`.

        Raises CorpusError at the first bad record where `strict`.
        """
        work = BatchTokenizer(self.tokenizer, self.json_key, self.valid_share, self.documents)
        records = read_batches(paths, self.documents, summary)
        with contextlib.closing(tokenized(records, work, self.workers)) as batches:
            for batch in batches:
                if self.strict and batch.bad:
                    raise CorpusError(f"{batch.bad[0]} (--strict stops at the first bad record)")
                summary.add(batch)
                yield batch
                done = f"{counted(summary.documents, 'document')}{of}, {counted(summary.tokens, 'token')}"
                self.advance(batch.num_bytes, done)


def preprocess(paths: Sequence[Path], plan: Preprocessing) -> Summary:
    """Tokenise the documents of `paths` into the plan's datasets.

    Raises DataError; then nothing is left behind, and an older dataset of that name is untouched.
    """
    summary = Summary()
    with contextlib.ExitStack() as stack:
        writers = plan.open_writers(stack)
        for batch in stack.enter_context(contextlib.closing(plan.token_batches(paths, summary))):
            write_batch(writers, batch.ids, batch.lengths, batch.is_held_out)
        check(summary, plan)
        for writer in writers:
            writer.finish(summary.inputs)
    return summary


def write_batch(
    writers: Sequence[TokenStoreWriter], ids: np.ndarray, lengths: np.ndarray, is_held_out: np.ndarray
) -> None:
    """Append documents to the dataset, and those that are held out to the second one where there is one."""
    for writer, is_meant in zip(writers, (~is_held_out, is_held_out), strict=False):
        writer.add_many(ids[np.repeat(is_meant, lengths)], lengths[is_meant])


def check(summary: Summary, plan: Preprocessing) -> None:
    """Refuse to publish datasets without documents."""
    if not summary.documents:
        reasons = "; ".join(summary.reported[:2]) or "no text in it"
        raise CorpusError(f"the input holds no document ({counted(summary.bad_records, 'bad record')}): {reasons}")
    if plan.valid_output is not None and summary.held_out_documents in (0, summary.documents):
        documents = counted(summary.documents, "document")
        raise CorpusError(
            f"{summary.held_out_documents:,} of {documents} fell to {plan.valid_output}, which leaves a dataset empty. "
            + ways_to_more_documents(summary, plan)
        )


def ways_to_more_documents(summary: Summary, plan: Preprocessing) -> str:
    """What was seen of a text that has too few documents to hold some out, and what helps."""
    ways = []
    if plan.documents in ("blank_lines", "files") and summary.lines > summary.documents:
        ways.append(f"--documents lines makes each of its {summary.lines:,} lines a document")
    if plan.documents != "parts":
        ways.append(f"--documents parts cuts long texts into documents of {PART_CHARACTERS:,} characters")
    ways.append(f"another --valid_share (it is {plan.valid_share:g}) or more text")
    seen = "No blank line divides the text. " if plan.documents == "blank_lines" and summary.documents == 1 else ""
    return f"{seen}What helps: {'; '.join(ways)}"
