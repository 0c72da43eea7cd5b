"""When Python looks for garbage that refers to itself: all ranks at the same steps.

Left to itself it does so whenever this many objects were made, on each rank at another time, and takes up to a second
where millions of objects are alive; the others wait for that rank each time. Nothing that a step makes depends on it
(`tests/distributed/test_step_waits.py`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

STEPS_BETWEEN = 100


@contextlib.contextmanager
def collected_by_steps() -> Iterator[Callable[[int], None]]:
    """Nothing is collected inside but by what it gives, which is to be called with every step that is done.

    What there is already is left out of it: it stays as long as the run does.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield after_step
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def after_step(step: int) -> None:
    """Collect where it is time to."""
    if step % STEPS_BETWEEN == 0:
        gc.collect()
