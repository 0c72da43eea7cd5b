"""Ranks succeed or fail together."""

from __future__ import annotations

import pytest
import torch.distributed as distributed
from ranks import run_ranks

from deberta_xl.base.errors import UserError
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.together import gathered, on_rank_zero, rank_and_size, sent_to_rank_zero, together


def fail_on(ranks: tuple[int, ...], error: Exception) -> int:
    """The rank, or `error` on some ranks."""
    if distributed.get_rank() in ranks:
        raise error
    return distributed.get_rank()


def outcomes() -> list[tuple[str, str]]:
    """Type and message of what each failing action raises on this rank."""
    actions = [
        lambda: together(lambda: fail_on((1,), OSError(28, "No space left on device"))),
        lambda: together(lambda: fail_on((1, 2), UserError("the file is gone"))),
        lambda: on_rank_zero(lambda: fail_on((0,), UserError("the folder exists"))),
        lambda: together(lambda: fail_on((2,), KeyError("a bug"))),
    ]
    raised = []
    for action in actions:
        with pytest.raises((CheckpointError, RuntimeError)) as caught:
            action()
        raised.append((caught.type.__name__, str(caught.value)))
    return raised


def results() -> tuple:
    """What the three ways give when all goes well."""
    rank = distributed.get_rank()
    return gathered(lambda: rank), together(lambda: rank), on_rank_zero(lambda: rank), rank_and_size()


def test_each_way_gives_its_ranks_results():
    assert run_ranks(results, 3) == [([0, 1, 2], rank, 0, (rank, 3)) for rank in range(3)]


def test_a_failure_on_some_ranks_is_raised_on_all_with_its_reason():
    for raised in run_ranks(outcomes, 3):
        assert raised == [
            ("CheckpointError", "rank 1: OSError: [Errno 28] No space left on device"),
            ("CheckpointError", "rank 1: the file is gone"),
            ("CheckpointError", "rank 0: the folder exists"),
            ("RuntimeError", "rank 2: KeyError: 'a bug'"),
        ]


def test_what_each_rank_gives_reaches_rank_zero_alone():
    assert run_ranks(lambda: sent_to_rank_zero(distributed.get_rank() + 1), 3) == [[1, 2, 3], [], []]


def test_without_a_process_group_there_is_one_rank():
    assert rank_and_size() == (0, 1)
    assert gathered(lambda: "alone") == ["alone"]
    with pytest.raises(CheckpointError, match=r"^the file is gone$"):
        together(lambda: (_ for _ in ()).throw(UserError("the file is gone")))
