"""From text files to a dataset: batches of tokens are written in order, and what became of the input is counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deberta_xl.base.errors import CorpusError, counted
from deberta_xl.corpus.documents import PART_CHARACTERS
from deberta_xl.corpus.token_batches import BatchTokenizer, TokenBatch, read_batches, tokenized
from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.words import WordLengths

MAX_REPORTED = 10
"""Bad records that are described; the rest is only counted."""


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
        records = read_batches(paths, self.documents, summary.inputs)
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
