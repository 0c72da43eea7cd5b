"""What the watchdog sees in heartbeat files, and whom it blames."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from deberta_xl.base import signs
from deberta_xl.run import heartbeat as heartbeat_module
from deberta_xl.run.heartbeat import Heartbeat, pace
from deberta_xl.run.ownership import Ownership
from deberta_xl.run.watchdog import Beat, blame, describe, read_beats, watch


def beat(rank: int, *, step: int = 7, marked: float = 100.0, alive: float = 1000.0) -> Beat:
    """A heartbeat in the forward pass."""
    return Beat(rank, f"n{rank // 2 + 1}", step, "forward-backward", marked, alive)


def write(folder: Path, rank: int, marked: float, changed: float) -> None:
    """A heartbeat file as a rank leaves it."""
    path = folder / f"rank-{rank:05d}.json"
    path.write_text(json.dumps({"rank": rank, "host": "n1", "step": 3, "phase": "data", "time": marked}))
    os.utime(path, (changed, changed))


def test_a_process_without_sign_of_life_is_blamed_although_others_have_the_same_mark():
    assert blame([beat(0), beat(1, alive=980.0), beat(2)]) == ("no sign of life", [beat(1, alive=980.0)])


def test_among_the_living_the_one_furthest_behind_is_blamed():
    late, same_step = beat(1, step=6, marked=90.0), beat(0, step=7)
    assert blame([same_step, late, beat(2)])[1] == [late]
    # In the same step: whoever entered its phase long before the others.
    assert blame([beat(0, marked=160.0), beat(1, marked=100.0), beat(2, marked=160.5)])[1] == [beat(1, marked=100.0)]


def test_of_ranks_in_the_same_phase_the_one_that_has_done_less_and_does_not_wait_is_blamed():
    evaluating = [beat(rank)._replace(phase="evaluation", units=12 - (rank == 2)) for rank in range(4)]
    assert blame(evaluating)[1] == [evaluating[2]]
    saving = [beat(rank)._replace(phase="checkpoint", units=rank, waits=rank != 3) for rank in range(4)]
    assert blame(saving)[1] == [saving[3]]
    # A rank that has begun the next phase of the step is not behind, however long ago that was.
    assert blame([beat(0, marked=5.0)._replace(turn=2), beat(1)])[1] == [beat(1)]


def test_where_nobody_is_behind_nobody_is_blamed():
    assert "none is behind" in describe([beat(0), beat(1, marked=102.0)], 900.0)
    assert "the others" not in describe([beat(0)], 900.0)


def test_the_message_names_rank_node_step_and_phase_and_is_no_list_of_thousands():
    text = describe([beat(0), beat(3, alive=900.0)], seconds=42.0)
    assert "nothing has moved for 42 s: rank 3 on n2 (step 7, forward-backward): no sign of life" in text
    assert "and 992 more" in describe([beat(rank) for rank in range(1000)], 42.0)
    assert "no rank has begun" in describe([], 42.0)


def test_files_of_an_earlier_start_do_not_count(tmp_path):
    write(tmp_path, 0, marked=5.0, changed=100.0)
    write(tmp_path, 1, marked=5.0, changed=300.0)
    (tmp_path / "rank-00002.json").write_text("")  # a file system that shows a new file before its content
    assert [found.rank for found in read_beats(tmp_path, since=200.0)] == [1]


def test_it_waits_as_long_as_something_moves(tmp_path):
    start = time.monotonic()
    write(tmp_path, 0, marked=1.0, changed=time.time())
    assert "rank 0 on n1 (step 3, data)" in watch(tmp_path, since=0.0, limit_seconds=0.5)
    assert time.monotonic() - start >= 0.5


def test_many_ranks_write_less_often_but_every_one_gives_its_sign_of_life():
    assert pace(1) == pace(250) == (1.0, 5)
    for world_size in range(1, 3000, 7):
        seconds, looks = pace(world_size)
        assert seconds * looks <= 5.0
        assert world_size / seconds <= 310 or seconds == 5.0


def test_work_that_is_slow_but_gets_on_is_left_alone_and_what_stands_still_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "INTERVAL_SECONDS", 0.05)
    heartbeat = Heartbeat(tmp_path, 0, Ownership(tmp_path / "OWNER", "nobody else"))
    heartbeat.mark(6, "evaluation")
    ended: list[str] = []
    watcher = threading.Thread(target=lambda: ended.append(watch(tmp_path, since=0.0, limit_seconds=0.6)))
    watcher.start()
    for _ in range(8):  # twice the limit, in one phase of one step
        time.sleep(0.15)
        signs.moved()
    assert not ended
    watcher.join(timeout=20)
    heartbeat.close()
    assert "rank 0" in ended[0]
    assert "(step 6, evaluation)" in ended[0]
