"""Signals that ask a run to stop. Imports no torch: a signal that comes while torch is imported is not lost either.

A signal handler may interrupt anything, a write to the console included: it notes what came, and nothing else.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from deberta_xl.base.interruption import end_at_once

ENDED_BY_TERM = 128 + signal.SIGTERM
ENDED_BY_TERM_UNDER_SRUN = 1
"""A rank that refuses to start makes srun send TERM to all others, and then tell the greatest status of all: that must
be the one of the rank that knows why (`training_command.REFUSED`)."""
ONE_INTERRUPT_SECONDS = 2.0
"""Interrupts within this time are the same Ctrl-C."""


class StopRequest:
    """Remembers that SIGUSR1 or, once training runs, SIGTERM or Ctrl-C asked this process to stop.

    Before the first step there is nothing to save, and there may never be one, where a peer does not come: SIGTERM and
    Ctrl-C end a start at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.first_interrupt: float | None = None
        self.handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
            signal.SIGUSR1: self.receive, signal.SIGTERM: end_start,
        }  # fmt: skip
        self.listen()
        if signal.getsignal(signal.SIGINT) is end_at_once:  # for the imports only
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = signal.Signals(number)

    def listen(self) -> None:
        """Take the signals, also from a library that has taken them behind Python's back: the first kernel that Triton
        compiles makes LLVM's handlers those of this process, which lose SIGUSR1."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def training_begins(self) -> None:
        """From now on SIGTERM and the first Ctrl-C stop after a step, too; a later Ctrl-C ends this process."""
        self.handlers |= {signal.SIGTERM: self.receive, signal.SIGINT: self.receive_interrupt}
        self.listen()

    def receive_interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C. torchrun passes on what the terminal has sent already, so two at once are one."""
        self.first_interrupt = self.first_interrupt or time.monotonic()
        if time.monotonic() - self.first_interrupt > ONE_INTERRUPT_SECONDS:
            raise KeyboardInterrupt
        self.receive(number, frame)


def end_start(_number: int, _frame: FrameType | None) -> NoReturn:
    """The handler of SIGTERM before training begins. Threads and peers are not waited for."""
    os.write(2, b"received SIGTERM before the first step: ended; start the same command again to go on\n")
    os._exit(ENDED_BY_TERM_UNDER_SRUN if "SLURM_PROCID" in os.environ else ENDED_BY_TERM)
