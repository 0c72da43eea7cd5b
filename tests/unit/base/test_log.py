"""What a record looks like, and what becomes of others' warnings."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator

import pytest

from deberta_xl.base import log
from deberta_xl.base.log import CLEAR_LINE, configure_logging, logger


@pytest.fixture
def own_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package's logging as a command sets it up, for one test."""
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    propagate, level = logger.propagate, logger.level
    configure_logging()
    yield
    logger.propagate = propagate
    logger.setLevel(level)


def test_a_record_has_a_date_and_names_rank_and_level_where_they_are_not_the_rule(own_handlers, monkeypatch, capsys):
    logger.info("step 1/2")
    monkeypatch.setattr(log, "current_rank", lambda: 3)
    logger.warning("slow")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\] step 1/2", first)
    assert re.fullmatch(r"\[20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\] rank 3: warning: slow", second)


def test_another_ranks_record_takes_the_place_of_the_line_that_moves_on_a_terminal(own_handlers, monkeypatch, capsys):
    monkeypatch.setattr(log, "current_rank", lambda: 3)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    logger.warning("slow")
    assert capsys.readouterr().err.startswith(CLEAR_LINE + "[20")


def test_a_librarys_warning_is_a_record_of_one_line(own_handlers, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("something\n  is deprecated", FutureWarning, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("] warning: FutureWarning: something is deprecated")
