"""What is concluded from the best weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from deberta_xl.checkpoint.manifest import CheckpointError, content_facts, step_folder_name, write_manifest
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.training import evaluating
from deberta_xl.training.evaluating import Evaluations
from deberta_xl.training.state import TrainState


def test_best_weights_that_were_damaged_since_are_refused_before_they_are_loaded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluating, "load_checkpoint", lambda *_, **__: pytest.fail("loaded unseen"))
    folder, state = RunFolder(tmp_path), TrainState(step=2, best_step=1)
    best = folder.checkpoints / step_folder_name(1)
    best.mkdir(parents=True)
    (best / "weights").write_bytes(b"as it was NOT written")
    write_manifest(best, {"weights": content_facts(b"as it was written")})
    evaluations = Evaluations(None, None, None, folder, state, None, None, None, None)
    with pytest.raises(CheckpointError, match="weights"):
        evaluations.conclude()
