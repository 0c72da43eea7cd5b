"""`deberta-xl COMMAND ...`: the training commands and the tools under one name.

The training commands are modules of the package. The tools stand in the repository's `tools/`, beside the package; they
are run from there, and an installation without a repository says so.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from deberta_xl.base.errors import ConfigError
from deberta_xl.commands.training_command import choose_accelerator
from deberta_xl.run.rendezvous import free_port
from deberta_xl.settings.presets import nearest

PACKAGE = Path(__file__).resolve().parent.parent
TOOLS = PACKAGE.parent / "tools"
TRAINING = {"pretrain": "Pretrain a DeBERTa.", "finetune": "Fine-tune one on a task."}
DESCRIBING = ("--check", "--print-config", "--print_config", "-h", "--help")
"""With these a training command starts no ranks: `--check --ranks N` is its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with its arguments; the exit status. A training command on several ranks takes over the process."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    known = command_names()
    if name in ("-h", "--help"):
        sys.stdout.write(describe_all(known))
        return 0
    if name not in known:
        missing = "" if TOOLS.is_dir() else "; the tools stand in a clone of the repository (pip install -e)"
        return refuse(f"no command {name!r}; {nearest(name, known)}{missing}")
    script = known[name]
    if name in TRAINING and not set(DESCRIBING) & set(rest):
        ranks, rest = take_ranks(rest)
        if ranks is not None:
            return start_ranks(ranks, script, rest)
    sys.argv = [f"deberta-xl {name}", *rest]
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def refuse(reason: str) -> int:
    """Say why on standard error; the exit status."""
    sys.stderr.write(f"error: {reason}\n")
    return 2


def command_names() -> dict[str, Path]:
    """Command -> its script."""
    tools = sorted(TOOLS.glob("*.py")) if TOOLS.is_dir() else []
    training = {name: PACKAGE / f"{name}.py" for name in TRAINING}
    return training | {path.stem.replace("_", "-"): path for path in tools}


def describe_all(known: dict[str, Path]) -> str:
    """A line for each command: the first of what it says of itself."""
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {TRAINING.get(name) or first_line(path)}\n" for name, path in known.items()]
    return (
        "usage: deberta-xl COMMAND ...\n\n"
        + "".join(lines)
        + "\ndeberta-xl COMMAND --help explains a command; deberta-xl pretrain --ranks N ... starts N ranks here.\n"
    )


def first_line(script: Path) -> str:
    """The first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def take_ranks(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--ranks`, and the other arguments."""
    ranks, rest, words = None, [], iter(arguments)
    for word in words:
        if word == "--ranks":
            ranks = next(words, "")
        elif word.startswith("--ranks="):
            ranks = word.partition("=")[2]
        else:
            rest.append(word)
    return ranks, rest


def start_ranks(ranks: str, script: Path, arguments: Sequence[str]) -> int:
    """Become the launcher of `ranks` ranks on this machine; returns only where that cannot be."""
    if not (ranks.isascii() and ranks.isdigit() and 0 < int(ranks[:6]) < 10**5):
        return refuse(f"--ranks {ranks}: a number of ranks, at least 1; one for each GPU")
    try:
        choose_accelerator()
    except ConfigError as error:
        return refuse(str(error))
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", ranks]
    command = [sys.executable, *launcher, "--master_port", str(free_port()), str(script), *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, command)
