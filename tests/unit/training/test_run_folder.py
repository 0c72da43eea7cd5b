"""The small files of a run."""

from __future__ import annotations

import json
import logging
import time

import pytest

from deberta_xl.config_file import load_run_config
from deberta_xl.errors import ConfigError
from deberta_xl.log import logger
from deberta_xl.training.figures import save_loss_curve
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.metrics import MetricsWriter
from deberta_xl.training.run_folder import RunFolder
from deberta_xl.training.state import TrainState, check_fingerprints


@pytest.fixture
def warnings(monkeypatch, caplog):
    """What is logged."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def tokenizer_folder(tmp_path):
    """Some folder to copy."""
    folder = tmp_path / "source.tokenizer"
    folder.mkdir()
    (folder / "spm.model").write_bytes(b"model")
    return folder


def test_a_folder_is_prepared_and_taken_over(tmp_path, warnings):
    folder, source = RunFolder(tmp_path / "run"), tokenizer_folder(tmp_path)
    config = load_run_config("debug", ["train.steps=50"])
    folder.prepare(config, source, {"world_size": 2})
    assert load_run_config(folder.config) == config
    assert json.loads(folder.environment.read_text())["world_size"] == 2
    assert (folder.tokenizer / "spm.model").read_bytes() == b"model"
    assert folder.state() is None
    folder.write_state("running")
    assert folder.state() == "running"
    folder.prepare(config, source, {})
    assert "changed configuration" not in warnings.text
    folder.prepare(load_run_config("debug", ["train.steps=60"]), source, {})
    assert "steps = 60" in warnings.text


def test_a_folder_that_cannot_be_made_is_an_error_for_people(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.folder"):
        RunFolder(tmp_path / "file" / "run").prepare(load_run_config("debug"), tmp_path, {})


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricsWriter(file, tmp_path / "tensorboard", first_step=first, total_steps=4)
        for step in steps:
            writer.write(step, {"loss": float(step), "loss_scale": None})
        writer.close()
        with file.open("a") as torn:
            torn.write('{"step": 2, "lo')
    lines = file.read_text().splitlines()[:-1]
    assert [json.loads(line) for line in lines] == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]


def test_the_loss_curve_is_a_picture(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    lines += [{"step": 2, "valid_loss": 2.5, "valid_unigram_entropy": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_heartbeat_tells_step_and_phase_while_the_rank_works(tmp_path):
    heartbeat = Heartbeat(tmp_path, rank=3)
    heartbeat.mark(7, "optimizer")
    path, deadline = tmp_path / "rank-00003.json", time.monotonic() + 20
    while json.loads(path.read_text())["step"] != 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    beat = json.loads(path.read_text())
    assert (beat["rank"], beat["step"], beat["phase"]) == (3, 7, "optimizer")
    heartbeat.mark(8, "done")
    heartbeat.close()
    assert json.loads(path.read_text())["phase"] == "done"


def test_another_dataset_or_architecture_is_refused_with_the_difference():
    saved = {"data": "abc", "architecture": {"num_layers": 2, "hidden_size": 8}}
    check_fingerprints(saved, saved)
    with pytest.raises(ConfigError, match=r"another data: was 'abc', now 'def'"):
        check_fingerprints(saved, saved | {"data": "def"})
    with pytest.raises(ConfigError, match=r"num_layers was 2, now 3"):
        check_fingerprints(saved, saved | {"architecture": {"num_layers": 3, "hidden_size": 8}})


def test_the_state_advances_by_whole_steps():
    state = TrainState()
    state.advance(8)
    state.advance(8)
    assert (state.step, state.consumed_samples) == (2, 16)
