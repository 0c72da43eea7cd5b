"""Where ranks exchange words, and how long they wait for each other."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.parallel.host_group import patience

LAUNCH = Path(__file__).parents[3] / "slurm" / "lib" / "launch.sh"


def test_the_watchdog_names_a_rank_before_a_collective_ends_the_run():
    (usual,) = re.findall(r"\$\{WATCHDOG_SECONDS:=(\d+)\}", LAUNCH.read_text(encoding="utf-8"))
    for seconds in (usual, "7200", "100000"):
        assert patience({"WATCHDOG_SECONDS": seconds}) >= timedelta(seconds=2 * int(seconds))
    assert patience({}) == timedelta(hours=1)
    with pytest.raises(ConfigError, match="WATCHDOG_SECONDS=soon is no whole number"):
        patience({"WATCHDOG_SECONDS": "soon"})
