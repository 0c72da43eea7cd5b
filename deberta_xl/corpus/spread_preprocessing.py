"""Preprocessing spread over many processes, on many nodes: each tokenises whole files, the first one joins the parts.

Parts lie beside the output, so no text and no tokens travel between processes; the joined dataset is byte for byte
what one process would have written. `Communicator` is what is needed of an MPI communicator: nothing here imports MPI.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from deberta_xl.base.errors import DataError, UserError
from deberta_xl.corpus.preprocessing import MAX_REPORTED, Preprocessing, Summary, check, write_batch
from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.token_store_format import dataset_paths

JOINED_AT_ONCE = 2**16
"""Documents that are read at a time when parts are joined."""


class Communicator(Protocol):
    """The part of an MPI communicator that is used."""

    def Get_rank(self) -> int:
        """This process's number."""

    def Get_size(self) -> int:
        """How many there are."""

    def allgather(self, sendobj: Any) -> list[Any]:
        """Everybody's object, to everybody."""


class Part(NamedTuple):
    """The tokens of one input file, on disk: ids and, per document, length and whether it is held out."""

    ids: Path
    lengths: Path
    held_out: Path

    @classmethod
    def of(cls, folder: Path, number: int) -> Part:
        """The part of input file `number`."""
        return cls(*(folder / f"{number:06d}.{name}" for name in cls._fields))


def share_of(rank: int, size: int, num_bytes: Sequence[int]) -> list[int]:
    """The numbers of the files that `rank` of `size` tokenises: largest first, each to whoever has least so far."""
    loads = [0] * size
    owner = {}
    for number in sorted(range(len(num_bytes)), key=lambda number: (-num_bytes[number], number)):
        owner[number] = loads.index(min(loads))
        loads[owner[number]] += num_bytes[number]
    return sorted(number for number, its_rank in owner.items() if its_rank == rank)


def preprocess_spread(paths: Sequence[Path], plan: Preprocessing, communicator: Communicator) -> Summary:
    """What `preprocess` does, by all processes of `communicator` together; the same summary on each. Collective.

    Raises DataError on all of them when one of them meets something that a user can mend; nothing is left behind then.
    """
    rank, size = communicator.Get_rank(), communicator.Get_size()
    bin_file = dataset_paths(plan.output).bin
    folder = bin_file.with_name(f"{bin_file.name}.parts.partial")
    with contextlib.ExitStack() as stack:
        writers: list[TokenStoreWriter] = []

        def prepare() -> None:
            writers.extend(plan.open_writers(stack))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)

        agree(communicator, prepare if rank == 0 else lambda: None)
        mine = share_of(rank, size, [path.stat().st_size for path in paths])

        def tokenize() -> dict[int, Summary]:
            return {number: write_part(Part.of(folder, number), paths[number], plan) for number in mine}

        summaries = {n: summary for of_rank in agree(communicator, tokenize) for n, summary in of_rank.items()}
        total = joined_summary([summaries[number] for number in range(len(paths))])

        def join() -> None:
            check(total, plan)
            for number in range(len(paths)):
                join_part(Part.of(folder, number), writers)
            for writer in writers:
                writer.finish(total.inputs)

        agree(communicator, join if rank == 0 else lambda: None)
    return total


def agree(communicator: Communicator, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every process; what each returned. DataError on all when it fails on one for a user's reason."""
    result, reason = None, None
    try:
        result = action()
    except (UserError, OSError) as error:
        reason = str(error)
    answers = communicator.allgather((result, reason))
    reasons = [reason for _, reason in answers if reason is not None]
    if reasons:
        raise DataError(reasons[0])
    return [result for result, _ in answers]


def write_part(part: Part, path: Path, plan: Preprocessing) -> Summary:
    """Tokenise one input file into its part; what became of it."""
    summary = Summary()
    with contextlib.ExitStack() as stack:
        ids, lengths, held_out = (stack.enter_context(open(file, "wb")) for file in part)
        batches = plan.token_batches([path], summary, of=f" of {path.name}")
        for batch in stack.enter_context(contextlib.closing(batches)):
            ids.write(batch.ids.astype(np.int32).data)
            lengths.write(batch.lengths.astype(np.int64).data)
            held_out.write(batch.is_held_out.data)
    return summary


def join_part(part: Part, writers: Sequence[TokenStoreWriter]) -> None:
    """Append a part to the outputs, and delete it."""
    for ids, lengths, is_held_out in read_part(part):
        write_batch(writers, ids, lengths, is_held_out)
    for file in part:
        file.unlink()


def read_part(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A part in pieces of some documents: ids, lengths, and which are held out."""
    lengths, is_held_out = np.fromfile(part.lengths, np.int64), np.fromfile(part.held_out, bool)
    with open(part.ids, "rb") as file:
        for start in range(0, len(lengths), JOINED_AT_ONCE):
            piece = slice(start, start + JOINED_AT_ONCE)
            yield np.fromfile(file, np.int32, int(lengths[piece].sum())), lengths[piece], is_held_out[piece]


def joined_summary(parts: Sequence[Summary]) -> Summary:
    """The summary of all parts, in the order of the files."""
    total = Summary()
    for part in parts:
        total.documents += part.documents
        total.tokens += part.tokens
        total.unknown_tokens += part.unknown_tokens
        total.held_out_documents += part.held_out_documents
        total.held_out_tokens += part.held_out_tokens
        total.empty_documents += part.empty_documents
        total.bad_records += part.bad_records
        total.lines += part.lines
        total.literal_specials += part.literal_specials
        total.words = total.words.plus(part.words)
        total.unknown_characters += part.unknown_characters
        total.inputs += part.inputs
        total.reported += part.reported[: MAX_REPORTED - len(total.reported)]
    return total
