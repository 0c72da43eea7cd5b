"""Ctrl-C and SIGTERM end a tool within seconds, with a true sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deberta_xl.base.interruption import (
    Interrupted,
    Outputs,
    be_quick_while_importing,
    end_at_once,
    held_back,
    interruptible,
)
from deberta_xl.base.stop_request import StopRequest

ROOT = Path(__file__).parents[3]
TOOL = """
import argparse, hashlib, sys, time
from pathlib import Path
from deberta_xl.base.command_line import run_tool

def work(arguments):
    print("working", flush=True)
    {work}

sys.exit(run_tool(work, argparse.Namespace(), outputs=lambda given: [Path(name) for name in {outputs}]))
"""
DEAF = "import subprocess; subprocess.Popen(['sleep', '60']); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
"""Runs no signal handler for half an hour, and has a child that would keep this test waiting for what it says."""


def interrupted(number: int, work: str, outputs: list[str], folder: Path, **environment: str) -> tuple[int, str, float]:
    """Exit status, what it said and the seconds it took after the signal."""
    kept = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    with subprocess.Popen(
        [sys.executable, "-c", TOOL.format(work=work, outputs=outputs)],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tool:
        assert tool.stdout.readline() == "working\n"
        time.sleep(0.1)
        tool.send_signal(number)
        started = time.monotonic()
        said = tool.communicate(timeout=30)[1]
        return tool.returncode, said, time.monotonic() - started


@pytest.mark.parametrize(
    ("number", "work", "outputs", "status", "said"),
    [
        (signal.SIGINT, "time.sleep(60)", [], 130, "interrupted\n"),
        (signal.SIGTERM, "time.sleep(60)", ["new"], 143, "interrupted; nothing was written\n"),
        (
            signal.SIGINT,
            "try: time.sleep(60)\n    finally: Path('new').touch(); time.sleep(0.2)",
            ["new"],
            130,
            "interrupted; new was written\n",
        ),
        (signal.SIGTERM, DEAF, ["new"], 143, "interrupted; nothing was written\n"),
    ],
)
def test_a_tool_ends_within_seconds_and_says_what_is_there(tmp_path, number, work, outputs, status, said):
    found = interrupted(number, work, outputs, tmp_path)
    assert found[:2] == (status, said)
    assert found[2] < 3


def test_what_must_be_whole_is_not_interrupted_whichever_thread_gets_the_signal():
    done, go, gone = [], threading.Event(), threading.Event()

    def get_signal() -> None:
        go.wait(10)
        signal.raise_signal(signal.SIGTERM)
        gone.set()

    def work() -> None:
        threading.Thread(target=get_signal, daemon=True).start()
        with held_back():
            go.set()
            gone.wait(10)
            done.append("whole")
        done.append("not this")

    with interruptible(None), pytest.raises(Interrupted) as raised:
        work()
    assert (done, raised.value.number) == (["whole"], signal.SIGTERM)


def test_nothing_is_said_to_be_unwritten_of_a_stream():
    assert Outputs([Path("/dev/stdout")]).sentence() == "interrupted; what /dev/stdout got is not whole"


def test_of_several_ranks_one_speaks(tmp_path):
    for rank, said in (("0", "interrupted\n"), ("1", "")):
        found = interrupted(signal.SIGTERM, "time.sleep(60)", [], tmp_path, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        assert found[:2] == (143, said)


def test_the_sentence_tells_written_kept_and_broken_outputs_apart(tmp_path):
    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "folder"
    old.write_text("x")
    outputs = Outputs([old, new])
    assert outputs.sentence() == f"interrupted; nothing was written, {old} is as it was"
    new.touch()
    assert outputs.sentence() == f"interrupted; {new} was written"
    old.unlink()
    assert f"while {old} was being replaced, which is not whole now" in outputs.sentence()
    folder.mkdir()
    outputs = Outputs([folder])
    assert outputs.sentence().endswith(f"{folder} is as it was")
    folder.rename(tmp_path / "away")
    folder.mkdir()
    assert outputs.sentence() == f"interrupted; {folder} was written"


def test_an_interrupt_while_a_tool_is_imported_is_one_word(tmp_path):
    (tmp_path / "tools").mkdir()
    tool = tmp_path / "tools" / "slow.py"
    swallow = "try: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: pass\ntime.sleep(60)"
    tool.write_text(f"import os, signal, time\nimport deberta_xl.base.command_line\n{swallow}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, tool], env=environment, capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_every_tool_imports_what_handles_interrupts_before_anything_slow(path):
    imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
    modules = [line.split()[1] for line in imports if line != "from __future__ import annotations"]
    before = modules[: modules.index("deberta_xl.base.command_line")]
    assert set(before) <= sys.stdlib_module_names | {"collections.abc", "numpy"}


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_training_command_handles_interrupts_before_anything_slow(name, monkeypatch):
    lines = (ROOT / "deberta_xl" / f"{name}.py").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("from deberta_xl"))
    assert "    be_quick_while_importing()" in lines[:first]
    script = str(ROOT / "deberta_xl" / f"{name}.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)  # a process of xdist has none
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        be_quick_while_importing()
        assert signal.getsignal(signal.SIGINT) is end_at_once
        StopRequest()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
