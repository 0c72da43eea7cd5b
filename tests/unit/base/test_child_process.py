"""A command that is stopped has ended, with all that it has started, when the caller goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CALLER = """
import sys
from deberta_xl.base.child_process import run_to_end
from deberta_xl.base.interruption import Interrupted, interruptible
try:
    with interruptible(None):
        print(run_to_end([sys.executable, "-c", {command!r}], {{}}, launchers={launchers}), flush=True)
except Interrupted as interruption:
    print("after", interruption.number, flush=True)
"""
SLOW = """
import os, signal, time
def save(number, frame):
    time.sleep(0.5); os.write(1, b"saved after %d\\n" % number); os._exit(0)
signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)
print("ready", flush=True); time.sleep(60)
"""
LAUNCHER = f"""
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", {SLOW!r}]).returncode)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True); time.sleep(60)
"""


def start(command: str, launchers: int) -> subprocess.Popen:
    """A caller in a process group of its own, as a shell starts it, when its child is ready."""
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER.format(command=command, launchers=launchers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert caller.stdout.readline() == "ready\n"
    time.sleep(0.1)
    return caller


@pytest.mark.parametrize(
    ("command", "launchers", "to_all", "number", "child_sees"),
    [
        (SLOW, 0, False, signal.SIGTERM, 15),
        (LAUNCHER, 1, True, signal.SIGINT, 15),
        (LAUNCHER, 1, False, signal.SIGTERM, 15),
    ],
)
def test_what_was_started_ends_first_and_quietly(command, launchers, to_all, number, child_sees):
    with start(command, launchers) as caller:
        os.killpg(caller.pid, number) if to_all else caller.send_signal(number)
        said, complaints = caller.communicate(timeout=30)
    assert said.splitlines()[-1] == f"after {int(number)}"
    assert f"saved after {child_sees}" in said.splitlines()[0]
    assert complaints == ""


def test_a_second_signal_kills_what_does_not_end():
    with start(DEAF, 0) as caller:
        caller.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert caller.poll() is None
        started = time.monotonic()
        caller.send_signal(signal.SIGINT)
        assert caller.communicate(timeout=30)[0] == "after 2\n"
    assert time.monotonic() - started < 3
