"""SentencePiece's training in a child process, with its progress; `piece_trainer.py` is the child."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from deberta_xl.base.errors import TokenizerError
from deberta_xl.corpus import piece_trainer

PRUNING_STARTS = 0.3
"""Share of the work that is done when candidates begin to be pruned."""
STAGES = (
    ("Normalizing sentences", 0.02, "normalising"),
    ("Done! preprocessed", 0.05, "counting candidates"),
    ("Extracting seed", 0.05, "counting candidates"),
    ("Tokenizing input sentences", 0.25, "counting words"),
    ("EM training", PRUNING_STARTS, "choosing pieces"),
)
"""What SentencePiece's log says when a stage begins, the share of the work done by then, and the stage in words."""
POLL_SECONDS = 1.0


class PieceTraining:
    """A child that trains. Use as a context: at its end, however it comes, the child is gone."""

    def __init__(self, *, max_lines: int, seed: int) -> None:
        self.model = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `__exit__`)
        self.child = subprocess.Popen(
            [sys.executable, "-P", piece_trainer.__file__],
            stdin=subprocess.PIPE,
            stdout=self.model,
            stderr=subprocess.PIPE,
        )
        self.send({"max_lines": max_lines, "seed": seed, "parent": os.getpid()})

    def __enter__(self) -> PieceTraining:
        return self

    def __exit__(self, *exception: object) -> None:
        self.child.kill()
        self.child.wait()
        for file in (self.child.stdin, self.child.stderr, self.model):
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def send(self, fields: dict[str, Any]) -> None:
        """A line of JSON to the child."""
        self.child.stdin.write(json.dumps(fields).encode() + b"\n")

    def read(self, lines: Iterable[str]) -> None:
        """Hand the text over, line by line; none may be empty or hold a line end."""
        try:
            for line in lines:
                self.child.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise TokenizerError(self.reason_of_end(b"")) from None

    def train(self, options: dict[str, Any], advance: Callable[..., None], vocab_size: int) -> bytes:
        """The serialised SentencePiece model; `advance` hears of the share done in per cent, and of the stage.

        Raises TokenizerError with SentencePiece's complaint, or when the child is killed.
        """
        try:
            self.child.stdin.write(b"\n")
            self.send(options)
            self.child.stdin.close()
        except BrokenPipeError:
            raise TokenizerError(self.reason_of_end(b"")) from None
        last = b""
        progress, told, since, note = TrainingProgress(vocab_size), 0, time.monotonic(), ""
        for line in log_lines(self.child.stderr):
            if line:
                last = line
                stage = progress.note
                progress.read(line.decode(errors="replace"))
                since = since if progress.note == stage else time.monotonic()
            done = int(100 * progress.share)
            note = progress.note + (f" for {seconds} s" if (seconds := int(time.monotonic() - since)) > 1 else "")
            advance(done - told, note)
            told = done
        if self.child.wait():
            raise TokenizerError(self.reason_of_end(last))
        advance(100 - told, "")
        self.model.seek(0)
        return self.model.read()

    def reason_of_end(self, last_line: bytes) -> str:
        """Why the child has failed: its complaint, or the signal that ended it."""
        last_line = last_line or self.child.stderr.read()
        status, failed = self.child.wait(), piece_trainer.FAILED.encode()
        if failed in last_line:
            return last_line.rpartition(failed)[2].decode(errors="replace").strip()
        if status < 0:
            return f"SentencePiece was ended by signal {-status} (out of memory?); try fewer --max_lines"
        return f"SentencePiece ended with status {status}: {last_line.decode(errors='replace').strip()}"


def log_lines(pipe: BinaryIO) -> Iterator[bytes]:
    """The lines of a pipe until it is closed; an empty one for every POLL_SECONDS without any."""
    descriptor, rest = pipe.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(POLL_SECONDS):
                yield b""
                continue
            if not (chunk := os.read(descriptor, 2**16)):
                break
            *lines, rest = (rest + chunk).split(b"\n")
            yield from filter(None, lines)
    if rest:
        yield rest


class TrainingProgress:
    """How far SentencePiece is, by its log.

    Candidates are pruned by a quarter in each round, until a tenth more than the vocabulary are left: the logarithm of
    their number measures the way.
    """

    def __init__(self, vocab_size: int) -> None:
        self.share, self.note = 0.0, "starting"
        self.target = 1.1 * vocab_size
        self.candidates = 0

    def read(self, line: str) -> None:
        """Take notice of a line of the log."""
        for sign, share, note in STAGES:
            if sign in line:
                self.share, self.note = share, note
        if found := re.search(r"Initialized (\d+) seed", line):
            self.candidates = int(found[1])
        if found := re.search(r"EM sub_iter=\d+ size=(\d+)", line):
            self.prune_to(int(found[1]))

    def prune_to(self, left: int) -> None:
        """Take notice of the number of candidates left."""
        way = math.log(max(self.candidates, 2) / self.target)
        gone = math.log(max(self.candidates, 2) / max(left, 1))
        done = min(1.0, gone / way) if way > 0 else 1.0
        self.share = max(self.share, PRUNING_STARTS + (1 - PRUNING_STARTS) * done * 0.99)
        self.note = f"choosing pieces: {left:,} candidates"
