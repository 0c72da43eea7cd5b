"""The harness itself: results come back by rank, and whatever goes wrong on one rank is shown."""

from __future__ import annotations

import os
import signal
import time
from unittest import mock

import pytest
import torch
import torch.distributed as distributed
from ranks import RankError, run_ranks


def sum_over_ranks(addend: int) -> torch.Tensor:
    """A collective and work that would use threads."""
    value = torch.full((300_000,), float(distributed.get_rank() + addend)).exp().log()
    distributed.all_reduce(value)
    return value.mean()


def raise_on_rank_1() -> None:
    """One rank fails, the other waits for it in vain."""
    if distributed.get_rank() == 1:
        raise ValueError("the plate is empty")
    time.sleep(60)


def die_on_rank_1() -> None:
    """One rank is killed from outside."""
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def rank_of_environment() -> str:
    """The rank as a launcher would state it; no process group."""
    assert not distributed.is_initialized()
    return os.environ["RANK"]


def test_results_come_back_by_rank_with_large_ones_whole():
    torch.randn(400, 400).matmul(torch.randn(400, 400))  # whatever threads this process has started
    results = run_ranks(sum_over_ranks, 3, 10)
    assert [result.item() for result in results] == pytest.approx([33.0] * 3)
    assert run_ranks(lambda: torch.arange(500_000), 1)[0].sum() == torch.arange(500_000).sum()


def test_the_failing_rank_is_shown_with_its_traceback_and_the_others_are_ended():
    with mock.patch("ranks.GRACE_SECONDS", 0.3), pytest.raises(RankError) as caught:
        run_ranks(raise_on_rank_1, 2)
    assert "rank 1 raised" in str(caught.value)
    assert "in raise_on_rank_1" in str(caught.value)
    assert "ValueError: the plate is empty" in str(caught.value)
    assert "no report from rank 0" in str(caught.value)


def test_a_rank_that_is_killed_is_noticed():
    with mock.patch("ranks.GRACE_SECONDS", 0.3), pytest.raises(RankError, match="rank 1 died"):
        run_ranks(die_on_rank_1, 2)


def test_ranks_that_hang_are_ended_in_time():
    with pytest.raises(RankError, match=r"no report from rank 0, 1 within 1\.5 s"):
        run_ranks(time.sleep, 2, 60, timeout=1.5)


def test_a_function_may_make_its_own_process_group():
    assert run_ranks(rank_of_environment, 2, backend=None) == ["0", "1"]
