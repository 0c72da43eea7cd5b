"""What the tools share: how they explain themselves, and how they fail."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from deberta_xl.base.child_process import family
from deberta_xl.base.errors import UserError, counted
from deberta_xl.base.interruption import Interrupted, Outputs, be_quick_while_importing, interruptible
from deberta_xl.base.log import configure_logging, current_rank, take_any_character

# Tools import this module first: what comes after it may take seconds.
be_quick_while_importing()


def build_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser whose --help shows a tool's docstring as it is written."""
    take_any_character()  # --help is shown before a tool's work begins
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    # No shell expands the ~ of `--output=~/x` and of quoted patterns.
    parser.register("type", Path, lambda text: Path(text).expanduser())
    return parser


def add_precision(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, for tools that compute with a model."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="type of weights and activations: float32, the default, for figures to report; bfloat16 for many texts",
    )  # fmt: skip


def run_tool(
    work: Callable[[argparse.Namespace], None],
    arguments: argparse.Namespace,
    outputs: Callable[[argparse.Namespace], Iterable[Path]] = lambda arguments: (),
    *,
    waits: bool = False,
) -> int:
    """Run a tool's work; the exit status: 0, 2 after an error of the user's (one line on stderr).

    After Ctrl-C it is 130, after SIGTERM 143, and a line says what became of the `outputs`, which appear in one piece.
    The process ends within seconds even when it is deaf, unless it `waits` for what it has started.
    """
    configure_logging()

    def insist(number: int) -> None:
        end_interrupted(Interrupted(number), promised)
        for process in family(os.getpid())[1:]:
            process.send(signal.SIGKILL)
        os._exit(128 + number)

    try:
        promised = Outputs(outputs(arguments))
        with interruptible(None if waits else insist):
            work(arguments)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:
        complain(f"error: {describe(error)}")
        return 2
    except Interrupted as interruption:
        end_interrupted(interruption, promised)
        status = interruption.status
    else:
        return 0
    # Here, where what the work held is gone: a pool's semaphores, for example, which are complained of otherwise.
    if "mpi4py" in sys.modules:  # its end tells the other processes
        return status
    os._exit(status)  # the interpreter's own end takes seconds with torch, and may wait for peers


def end_interrupted(interruption: Interrupted, promised: Outputs) -> None:
    """Say on one rank what an interruption has left."""
    sys.stdout.flush()
    if current_rank() == 0:
        complain(interruption.text or promised.sentence())


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
    complain(f"warning: {counted(count, 'bad record')} {'was' if count == 1 else 'were'} skipped:")
    for example in examples:
        complain(f"  {example}")
    if count > len(examples):
        complain(f"  … and {count - len(examples):,} more")
