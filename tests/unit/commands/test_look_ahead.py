"""What `--check` finds in a run folder, as the start would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deberta_xl.base.durable import write_files
from deberta_xl.base.errors import ConfigError
from deberta_xl.commands.look_ahead import check_run_folder

PRINTS = {"data": "a", "architecture": {"num_layers": 2}}


def with_checkpoint(run: Path, step: int, prints: object) -> Path:
    """A run folder with a checkpoint's state."""
    state = {"step": step, "fingerprints": prints}
    write_files(run / "checkpoints" / f"step-{step:08d}", {"state.json": json.dumps(state).encode()})
    return run


@pytest.mark.parametrize(
    ("prints", "last_step", "words"),
    [
        (PRINTS | {"data": "b"}, 9, "another data"),
        (PRINTS | {"architecture": {"num_layers": 3}}, 9, "num_layers was 3, now 2"),
        (PRINTS, 4, "newest checkpoint is of step 5"),
    ],
)
def test_a_checkpoint_that_the_start_would_not_continue_is_refused(tmp_path, prints, last_step, words):
    with pytest.raises(ConfigError, match=words):
        check_run_folder(str(with_checkpoint(tmp_path, 5, prints)), lambda: PRINTS, last_step)


def test_what_the_start_would_take_is_admitted_and_nothing_is_made(tmp_path):
    check_run_folder(str(tmp_path / "new"), lambda: PRINTS, 9)
    assert not (tmp_path / "new").exists()
    run = with_checkpoint(tmp_path / "run", 5, PRINTS)
    write_files(run / "checkpoints" / "step-00000006", {"state.json": b"damaged"})
    check_run_folder(str(run), lambda: PRINTS, 9)


def test_a_run_whose_checkpoints_are_gone_is_refused(tmp_path):
    (tmp_path / "LATEST").write_text("step-00000005\n")
    with pytest.raises(ConfigError, match="was trained up to step-00000005"):
        check_run_folder(str(tmp_path), lambda: PRINTS, 9)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="file is a file"):
            check_run_folder(str(path), lambda: PRINTS, 9)


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may write anywhere
    with pytest.raises(ConfigError, match="may not be written to"):
        check_run_folder(str(tmp_path), lambda: PRINTS, 9)
