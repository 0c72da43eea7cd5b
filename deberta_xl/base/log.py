"""One logger for the package, with the rank in every record.

The rank comes from the launcher's environment, so the logger works before (and without) torch.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import read_launch

logger = logging.getLogger("deberta_xl")
CLEAR_LINE = "\r\x1b[2K"
"""For a terminal: back to the beginning of the line, and empty it."""


class StandardError(logging.Handler):
    """Writes to whatever `sys.stderr` is at the moment, so that a line of progress can keep what is logged above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        # The line of progress on the terminal is another process's: this one takes its place, and it is drawn anew.
        clear = CLEAR_LINE if current_rank() and sys.stderr.isatty() else ""
        sys.stderr.write(clear + self.format(record) + "\n")
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
    """Send the package's records to standard error, one line each: time, rank, level (above INFO), message.

    So go the warnings of libraries, each in one line.
    """
    take_any_character()
    handler = StandardError()
    handler.setFormatter(RankFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    warnings.showwarning = show_warning


def show_warning(
    message: Warning | str,
    category: type[Warning],
    _filename: str,
    _line_number: int,
    _file: object = None,
    _line: str | None = None,
) -> None:
    """A library's warning as a record: without the place in its source, which nobody here can mend."""
    logger.warning("%s: %s", category.__name__, " ".join(str(message).split()))


def log_to_file(path: Path) -> None:
    """Append the package's records to a file as well."""
    handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(RankFormatter())
    logger.addHandler(handler)


class RankFormatter(logging.Formatter):
    """`[2026-11-25 16:38:14] rank 1: warning: …`, as the job scripts write; rank 0 and INFO, the rule, go unmarked."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for one record."""
        rank = current_rank()
        marks = [self.formatTime(record, "[%Y-%m-%d %H:%M:%S]")]
        marks += [f"rank {rank}:"] if rank else []
        marks += [f"{record.levelname.lower()}:"] if record.levelno != logging.INFO else []
        text = " ".join([*marks, record.getMessage()])
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def rank_zero(message: str, *args: object, level: int = logging.INFO) -> None:
    """Log what the world needs once: on rank 0 only."""
    if current_rank() == 0:
        logger.log(level, message, *args)
