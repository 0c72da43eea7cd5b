"""What the tools share: how they explain themselves, and how they fail."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable

from deberta_xl.errors import UserError
from deberta_xl.log import configure_logging, take_any_character


def build_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser whose --help shows a tool's docstring as it is written."""
    take_any_character()  # --help is shown before a tool's work begins
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_tool(work: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a tool's work; the exit status: 0, 2 after an error of the user's (one line on stderr), 130 after Ctrl-C."""
    configure_logging()
    try:
        work(arguments)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:
        complain(f"error: {describe(error)}")
        return 2
    except KeyboardInterrupt:
        complain("error: interrupted; nothing was written")
        return 130
    return 0


def describe(error: OSError) -> str:
    """The system's complaint in a user's words, with the file where it is known."""
    place = f"{error.filename2 or error.filename}: " if error.filename else ""
    way_out = "; make room and start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{place}{error.strerror or error}{way_out}"


def complain(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(text + "\n")


def report_bad_records(count: int, examples: list[str]) -> None:
    """Say on standard error which records were skipped."""
    if not count:
        return
    complain(f"warning: {count:,} bad records were skipped:")
    for example in examples:
        complain(f"  {example}")
    if count > len(examples):
        complain(f"  … and {count - len(examples):,} more")
