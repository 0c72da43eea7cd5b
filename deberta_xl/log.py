"""One logger for the package, with the rank in every record.

The rank comes from the launcher's environment, so the logger works before (and without) torch.
"""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

from deberta_xl.errors import ConfigError
from deberta_xl.launch import read_launch

logger = logging.getLogger("deberta_xl")


class StandardError(logging.Handler):
    """Writes to whatever `sys.stderr` is at the moment, so that a progress bar can keep lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


class LogFile(logging.FileHandler):
    """A file of records. A full disk must not end a run for the sake of its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Let the record go: the console has it."""


def current_rank() -> int:
    """This process's rank as its launcher states it, 0 when alone, and where the statement is refused."""
    try:
        return read_launch().rank
    except ConfigError:
        return 0


def take_any_character() -> None:
    """Let the console show in escapes what its encoding has not (ASCII, cp1252), or what no encoding has: no crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def configure_logging(level: int = logging.INFO) -> None:
    """Send the package's records to standard error, one line each: time, rank, level (above INFO), message."""
    take_any_character()
    handler = StandardError()
    handler.setFormatter(RankFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def log_to_file(path: Path) -> None:
    """Append the package's records to a file as well."""
    handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(RankFormatter())
    logger.addHandler(handler)


class RankFormatter(logging.Formatter):
    """`12:30:01 [rank 1] WARNING: …`; rank 0 and INFO go unmarked, since they are the rule."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for one record."""
        rank = current_rank()
        marks = [self.formatTime(record, "%H:%M:%S")]
        marks += [f"[rank {rank}]"] if rank else []
        marks += [f"{record.levelname}:"] if record.levelno != logging.INFO else []
        text = " ".join([*marks, record.getMessage()])
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def rank_zero(message: str, *args: object, level: int = logging.INFO) -> None:
    """Log what the world needs once: on rank 0 only."""
    if current_rank() == 0:
        logger.log(level, message, *args)
