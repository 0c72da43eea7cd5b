"""Ranks succeed or fail together."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as distributed
from ranks import run_ranks

from deberta_xl.base.errors import UserError
from deberta_xl.checkpoint import store
from deberta_xl.checkpoint.manifest import CheckpointError, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS, Header, rank_file_name, read_header, write_rank_file
from deberta_xl.checkpoint.together import gathered, on_rank_zero, rank_and_size, together


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


def opened(folder: Path) -> tuple[list[str], list[str]]:
    """The rank files that this rank opens, and those whose headers it has then."""
    names = []

    def read(path: Path) -> Header:
        names.append(path.name)
        return read_header(path)

    with mock.patch.object(store, "read_header", read):
        return names, [path.name for path, _ in store.read_headers(folder)]


def test_every_rank_has_every_header_and_opens_its_share_of_the_files(tmp_path):
    names = [rank_file_name(rank) for rank in range(3)]
    nothing = {kind: torch.zeros(0) for kind in KINDS}
    write_manifest(tmp_path, {name: write_rank_file(tmp_path / name, [], nothing) for name in names})
    assert run_ranks(opened, 2, tmp_path) == [(names[::2], names), (names[1::2], names)]


def test_without_a_process_group_there_is_one_rank():
    assert rank_and_size() == (0, 1)
    assert gathered(lambda: "alone") == ["alone"]
    with pytest.raises(CheckpointError, match=r"^the file is gone$"):
        together(lambda: (_ for _ in ()).throw(UserError("the file is gone")))
