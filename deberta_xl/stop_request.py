"""Signals that ask a run to stop. Imports no torch: a signal that comes while torch is imported is not lost either.

A signal handler may interrupt anything, a write to the console included: it notes what came, and nothing else.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_INTERRUPT_SECONDS = 2.0
"""Interrupts within this time are the same Ctrl-C."""


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or, once training runs, Ctrl-C asked this process to stop at the next step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.first_interrupt: float | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = signal.Signals(number)

    def watch_interrupts(self) -> None:
        """From now on the first Ctrl-C stops like the other signals; a later one ends the process at once."""
        signal.signal(signal.SIGINT, self.receive_interrupt)

    def receive_interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C. torchrun passes on what the terminal has sent already, so two at once are one."""
        self.first_interrupt = self.first_interrupt or time.monotonic()
        if time.monotonic() - self.first_interrupt > ONE_INTERRUPT_SECONDS:
            raise KeyboardInterrupt
        self.receive(number, frame)
