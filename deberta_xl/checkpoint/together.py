"""Doing file work on all ranks so that they succeed or fail together.

A rank that raised alone would leave the others waiting in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as distributed

from deberta_xl.base import signs
from deberta_xl.base.errors import UserError
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.parallel.host_group import host_group

Result = TypeVar("Result")


class Outcome(NamedTuple):
    """How an action ended on one rank."""

    result: Any
    """What it returned."""
    reason: str | None
    """Why it failed; None when it did not."""
    is_fault: bool
    """Whether it failed for a reason that only a bug explains."""


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) when there is no process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(action: Callable[[], Result]) -> list[Result]:
    """Run `action` (without collectives) on every rank; what each returned, by rank. Collective.

    When it raised on any rank, every rank raises, with each distinct reason: CheckpointError when the causes are
    a user's or the system's (UserError, OSError), RuntimeError when one of them is a fault of ours.
    """
    outcome, cause = _outcome(action)
    outcomes = [outcome]
    if (world_size := rank_and_size()[1]) > 1:
        outcomes *= world_size
        signs.waits()
        distributed.all_gather_object(outcomes, outcome, group=host_group())
        signs.moved()
    _raise_failure(outcomes, cause)
    return [outcome.result for outcome in outcomes]


def together(action: Callable[[], Result]) -> Result:
    """Like `gathered`, but gives each rank its own result only, which does not travel. Collective."""
    results: list[Result] = []
    gathered(lambda: results.append(action()))
    return results[0]


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` (without collectives) on rank 0 only; its result, or its failure, on every rank. Collective."""
    rank, world_size = rank_and_size()
    outcome, cause = _outcome(action) if rank == 0 else (None, None)
    if world_size > 1:
        told = [outcome]
        signs.waits()
        distributed.broadcast_object_list(told, src=0, group=host_group())
        distributed.barrier(group=host_group())  # all have heard: where a rank leaves now, a launcher ends the others
        signs.moved()
        (outcome,) = told
    _raise_failure([outcome], cause)
    return outcome.result


def sent_to_rank_zero(value: Result) -> list[Result]:
    """What each rank has given, by rank; on rank 0 only, an empty list elsewhere. Collective."""
    rank, world_size = rank_and_size()
    if world_size == 1:
        return [value]
    received = [value] * world_size if rank == 0 else None
    signs.waits()
    distributed.gather_object(value, received, dst=0, group=host_group())
    signs.moved()
    return received or []


def _outcome(action: Callable[[], Any]) -> tuple[Outcome, Exception | None]:
    """How it ended here, and what it raised."""
    try:
        return Outcome(action(), None, is_fault=False), None
    except Exception as error:
        return Outcome(None, _reason(error), is_fault=not isinstance(error, (UserError, OSError))), error


def _raise_failure(outcomes: list[Outcome], cause: Exception | None) -> None:
    """What `gathered` raises, if there is any failure among the outcomes; `cause` is this rank's own."""
    if any(outcome.reason is not None for outcome in outcomes):
        is_fault = any(outcome.is_fault for outcome in outcomes)
        raise (RuntimeError if is_fault else CheckpointError)(_summary(outcomes)) from cause


def _reason(error: Exception) -> str:
    """An error in words: ours for users speak for themselves, others need their type."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _summary(outcomes: list[Outcome]) -> str:
    """The distinct reasons, with the first rank of each where there are several ranks."""
    first: dict[str, int] = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.reason is not None:
            first.setdefault(outcome.reason, rank)
    is_alone = rank_and_size()[1] == 1
    return "; ".join(reason if is_alone else f"rank {rank}: {reason}" for reason, rank in first.items())
