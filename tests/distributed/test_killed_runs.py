"""SIGKILL costs a run nothing but time, whatever it learns: the same command again ends where it would have ended."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch.distributed as distributed
from full_state import assert_bitwise_equal, full_state
from ranks import RankError, run_ranks
from small_dataset import SmallDataset
from test_pretrain_command import arguments

from deberta_xl.base.stop_request import StopRequest
from deberta_xl.checkpoint import store
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.commands.training_command import assemble
from deberta_xl.run.heartbeat import Heartbeat

PACE = ("train.steps=6", "checkpoint.interval=2", "evaluation.interval=3")
PAIR = ("train.objective=replaced_tokens", "generator.learning_rate=1e-4")
ONE_TABLE = ("replaced_tokens.sharing=es", "replaced_tokens.training=joint")
SECONDS = 300.0
TOLD = re.compile("step$|loss$|accuracy|grad_norm|replaced_share|precision|recall|f1|auc|samples$")


class Case(NamedTuple):
    """What is learned, on two ranks."""

    words: tuple[str, ...]
    engine: str = "cpu_debug"
    passes: int = 2
    """Forward and backward passes of a rank in a step."""


CASES = {
    "masked_lm": Case(()),
    "generator and discriminator in turns": Case(PAIR, "zero3_fp32", passes=4),
    "generator and discriminator jointly": Case((*PAIR, *ONE_TABLE, "parallel.tensor_parallel_size=2"), passes=4),
    "causal": Case(("train.objective=causal", "parallel.pipeline_parallel_size=2"), passes=1),
    "mixed": Case(("train.objective=mixed",)),
}


class Kill(NamedTuple):
    """The rank that is killed, and when."""

    rank: int
    step: int
    number: int
    """Of its forward and backward passes in that step; 0 for the save, between files and manifest."""


def train(given: list[str], kill: Kill | None) -> str:
    """A start on this rank; how it ended."""
    seen: Counter[int] = Counter()
    mark, write_manifest = Heartbeat.mark, store.write_manifest

    def die_if(is_now: bool) -> None:
        if kill is not None and is_now and distributed.get_rank() == kill.rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def mark_or_die(heartbeat: Heartbeat, step: int, phase: str) -> None:
        mark(heartbeat, step, phase)
        seen[step] += phase == "forward-backward"
        die_if(kill is not None and kill.number > 0 and (step, seen[step]) == (kill.step, kill.number))

    def write_or_die(folder: Path, *files: object) -> None:
        die_if(kill is not None and kill.number == 0 and f".step-{kill.step:08d}" in folder.name)
        write_manifest(folder, *files)

    with mock.patch.object(Heartbeat, "mark", mark_or_die), mock.patch.object(store, "write_manifest", write_or_die):
        return assemble(read_inputs(parse_arguments(given)), StopRequest()).train()


def told(folder: Path) -> list[dict[str, float]]:
    """The lines of the metrics, without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if TOLD.search(name)} for line in lines]


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_in_an_update_and_in_a_save_ends_as_one_that_is_not(
    name: str, small_dataset: SmallDataset, tmp_path: Path
):
    case = CASES[name]
    whole, killed = (
        arguments(small_dataset, tmp_path / folder, *PACE, *case.words, engine=case.engine)
        for folder in ("whole", "killed")
    )
    assert run_ranks(train, 2, whole, None, backend=None, timeout=SECONDS) == ["done"] * 2
    # In turns, the last pass of a step is the discriminator's: the generator has had its update already.
    for kill in (Kill(rank=1, step=3, number=case.passes), Kill(rank=0, step=4, number=0)):
        with mock.patch("ranks.GRACE_SECONDS", 1.0), pytest.raises(RankError, match=f"rank {kill.rank} died"):
            run_ranks(train, 2, killed, kill, backend=None, timeout=SECONDS)
    assert len(list((tmp_path / "killed" / "checkpoints").glob(".step-00000004.*.partial"))) == 1
    assert run_ranks(train, 2, killed, None, backend=None, timeout=SECONDS) == ["done"] * 2
    ended, expected = (tmp_path / folder / "checkpoints" for folder in ("killed", "whole"))
    assert sorted(os.listdir(ended)) == sorted(os.listdir(expected)) == [f"step-0000000{step}" for step in (2, 4, 6)]
    for step in ("step-00000004", "step-00000006"):
        assert_bitwise_equal(full_state(ended / step), full_state(expected / step))
        assert (ended / step / "state.json").read_text() == (expected / step / "state.json").read_text()
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
