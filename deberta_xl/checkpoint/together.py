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
    cause, result = None, None
    try:
        result = action()
    except Exception as error:
        cause = error
    outcomes = _gather(
        Outcome(result, _reason(cause), is_fault=not isinstance(cause, (UserError, OSError, type(None))))
    )
    if any(outcome.reason is not None for outcome in outcomes):
        is_fault = any(outcome.is_fault for outcome in outcomes)
        raise (RuntimeError if is_fault else CheckpointError)(_summary(outcomes)) from cause
    return [outcome.result for outcome in outcomes]


def together(action: Callable[[], Result]) -> Result:
    """Like `gathered`, but gives each rank its own result only, which does not travel. Collective."""
    results: list[Result] = []
    gathered(lambda: results.append(action()))
    return results[0]


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` (without collectives) on rank 0 only; its result, or its failure, on every rank. Collective."""
    rank, _ = rank_and_size()
    return gathered(lambda: action() if rank == 0 else None)[0]


def _gather(outcome: Outcome) -> list[Outcome]:
    """Every rank's outcome, by rank."""
    _, world_size = rank_and_size()
    outcomes = [outcome] * world_size
    if world_size > 1:
        signs.waits()
        distributed.all_gather_object(outcomes, outcome)
        signs.moved()
    return outcomes


def _reason(error: Exception | None) -> str | None:
    """An error in words: ours for users speak for themselves, others need their type."""
    if error is None:
        return None
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _summary(outcomes: list[Outcome]) -> str:
    """The distinct reasons, with the first rank of each where there are several ranks."""
    first: dict[str, int] = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.reason is not None:
            first.setdefault(outcome.reason, rank)
    return "; ".join(reason if len(outcomes) == 1 else f"rank {rank}: {reason}" for reason, rank in first.items())
