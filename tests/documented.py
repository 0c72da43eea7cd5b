"""The commands and programs of a document, as its reader would type them, made small enough for a test."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = [
    "model.vocab_size=none", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "train.steps=4",
    "model.intermediate_size=64", "model.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=4",
    "schedule.warmup_steps=2",
]  # fmt: skip
TINY_TASK = ["model.sequence_length=32", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=4"]


def commands(text: str) -> list[list[str]]:
    """The indented lines that are commands, in order, continuation lines joined."""
    blocks = re.findall(r"(?:^    \S.*\n(?:    .*\n)*)", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines]


def fenced(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def made_small(command: list[str], replaced: Mapping[str, str]) -> list[str]:
    """The same command at a size for tests: some of its words replaced, on one rank, tiny settings at its end."""
    words = [replaced.get(word, word) for word in command]
    if "--num_gpus" in words:
        place = words.index("--num_gpus")
        del words[place : place + 2]
    script = next((Path(word).name for word in words if word.endswith(".py")), "")
    tiny = {"pretrain.py": TINY, "finetune.py": TINY_TASK, "quickstart.py": ["--", *TINY]}.get(script, [])
    if "--check" in words:  # starts nothing, at any size
        tiny = []
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(29500 + os.getpid() % 1000)]
    return [sys.executable if words[0] == "python" else words[0], *words[1:], *tiny]


def run(command: list[str], folder: Path, seconds: int = 300) -> str:
    """Run a command to its end; what it said. Fails where the command does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        command, cwd=folder, env=environment, text=True, timeout=seconds,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}"
    return result.stdout


def link_checkout(folder: Path) -> Path:
    """Make a folder look like the repository's root."""
    for name in ("tools", "deberta_xl", "deepspeed_configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder
