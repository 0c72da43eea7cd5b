"""SentencePiece's training in a process of its own, started by its path: it imports nothing but SentencePiece.

While SentencePiece trains, Python sees no signal; a process that does nothing else can be ended at any moment, and is
gone when its parent is. Standard input: a line of JSON with `max_lines`, `seed` and `parent`, the text line by line, an
empty line, a line of JSON with SentencePiece's options (some depend on the text). Standard output: the model. Standard
error: SentencePiece's log; after a failure a last line that begins with FAILED.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
from collections.abc import Iterable, Iterator

import sentencepiece

FAILED = "FAILED "
PR_SET_PDEATHSIG = 1
"""Linux: a signal for this process when its parent ends."""


def main() -> None:
    """Read, train, write."""
    given = json.loads(sys.stdin.buffer.readline())
    end_with(given["parent"])
    lines = sample(until_blank(sys.stdin.buffer), given["max_lines"], random.Random(given["seed"]))
    last = sys.stdin.buffer.readline()
    if not last:
        sys.exit("the text ended without options: its sender has gone")
    sentencepiece.set_random_generator_seed(given["seed"])
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=taken(lines), model_writer=sys.stdout.buffer, **json.loads(last)
        )
        sys.stdout.buffer.flush()
    except (RuntimeError, TypeError, OSError) as error:
        sys.exit(FAILED + " ".join(str(error).split()))


def end_with(parent: int) -> None:
    """End at once on signals, and when the process `parent`, which started this one, has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("whoever started this has gone")


def until_blank(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file up to an empty one."""
    for line in file:
        if line == b"\n":
            return
        yield line[:-1]


def sample(lines: Iterable[bytes], size: int, generator: random.Random) -> list[bytes]:
    """All lines, or a random sample of `size` of them, each with the same chance."""
    kept: list[bytes] = []
    for number, line in enumerate(lines):
        if number < size:
            kept.append(line)
        elif (place := generator.randrange(number + 1)) < size:
            kept[place] = line
    return kept


def taken(lines: list[bytes]) -> Iterator[bytes]:
    """The lines, each given up as it is handed on: the text is never in memory twice."""
    lines.reverse()
    while lines:
        yield lines.pop()


if __name__ == "__main__":
    main()
