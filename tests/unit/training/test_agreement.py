"""What all ranks agree on is asked ahead: nobody waits when asking, and all hear the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import torch.distributed as dist
from ranks import run_ranks

from deberta_xl.training.agreement import Agreement, StopRequested
from deberta_xl.training.loop import Training


class Stop:
    """A request that comes when it is told to."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        """There is nothing to listen to."""


def ask_before_the_other_does() -> list[object]:
    """Rank 1 asks only after rank 0 has said that it has asked."""
    agreement, store = Agreement(), dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    if rank == 1:
        store.wait(["rank 0 has asked"])
    first = agreement.ask([rank + 1, 10], Stop())
    second = agreement.ask([], Stop())
    store.set(f"rank {rank} has asked", "")
    return [agreement.hear(first), agreement.hear(second), agreement.is_stopping]


def test_who_asks_does_not_wait_for_the_others():
    assert run_ranks(ask_before_the_other_does, 2, timeout=60) == [[[3, 20], [], False]] * 2


def stop_in_an_evaluation() -> list[object]:
    """Of 5 batches; rank 1 is asked to stop at the second."""
    agreement, stop, seen = Agreement(), Stop(), []
    for_the_next_step = agreement.ask([1], stop)
    try:
        for batch in agreement.until_stopped(range(5), stop):
            seen.append(batch)
            if (batch, dist.get_rank()) == (1, 1):
                stop.signal = signal.SIGUSR1
    except StopRequested:
        seen.append("stopped")
    # The step was asked before, when nobody wanted to stop; it is not made all the same.
    return [seen, agreement.hear(for_the_next_step), agreement.is_stopping]


def test_a_stop_in_an_evaluation_ends_it_one_batch_later_on_all_ranks_and_the_run_with_it():
    assert run_ranks(stop_in_an_evaluation, 2, timeout=60) == [[[0, 1, 2, "stopped"], [2], True]] * 2


class Batch:
    """A micro-batch of so many labels."""

    def __init__(self, count: int):
        self.counts = (count,)


def steps_of(first: int, total: int, stops_in: int | None) -> list[object]:
    """What this rank sees of a loop, which is asked to stop while a step is made."""
    events: list[object] = []

    def batches() -> Iterator[list[Batch]]:
        for step in range(first + 1, total + 1):
            yield [Batch(step), Batch(100)]

    agreement = Agreement()
    training = SimpleNamespace(
        state=SimpleNamespace(step=first), total_steps=total, agreement=agreement, stop=Stop(), batches=batches,
        objective=SimpleNamespace(counts=("labels",)),
        groups=SimpleNamespace(grid=SimpleNamespace(counts_labels=True)),
    )  # fmt: skip
    ask = agreement.ask
    agreement.ask = lambda counts, stop: events.append(("ask", counts[0] - 100)) or ask(counts, stop)
    training.ask = lambda micro_batches: Training.ask(training, micro_batches)
    steps = Training.agreed_steps(training)
    while training.state.step < total:
        micro_batches, counts = next(steps)
        if agreement.is_stopping:
            break
        step = micro_batches[0].counts[0]
        events.append(("make", step))
        assert counts == {"labels": 2 * (step + 100)}
        if (step, dist.get_rank()) == (stops_in, 1):
            training.stop.signal = signal.SIGUSR1
        training.state.step = step
    return events


def test_a_step_is_asked_before_the_one_in_front_of_it_is_made_and_none_behind_the_last():
    expected = [("ask", 4), ("ask", 5), ("make", 4), ("ask", 6), ("make", 5), ("make", 6)]
    assert run_ranks(steps_of, 2, 3, 6, None, timeout=60) == [expected] * 2


def test_a_run_that_is_asked_to_stop_makes_the_step_that_was_agreed_on_and_no_other():
    expected = [("ask", 1), ("ask", 2), ("make", 1), ("ask", 3), ("make", 2), ("ask", 4), ("make", 3)]
    # Asked while step 2 was made: the question of step 3 was on its way then, and that of step 4 tells it.
    assert run_ranks(steps_of, 2, 0, 9, 2, timeout=60) == [expected] * 2
