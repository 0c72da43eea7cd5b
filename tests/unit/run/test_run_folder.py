"""The small files of a run."""

from __future__ import annotations

import errno
import json
import logging
import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deberta_xl.base.durable import write_files
from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import logger
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.run.figures import loss_curves
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.metrics import MetricsWriter, save_curves
from deberta_xl.run.ownership import Ownership
from deberta_xl.run.run_folder import RunFolder
from deberta_xl.settings.presets import load_run_config
from deberta_xl.training.start import Start
from deberta_xl.training.state import TrainState, check_fingerprints, check_last_step


@pytest.fixture
def warnings(monkeypatch, caplog):
    """What is logged."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def source(small_dataset, tmp_path):
    """A tokenizer's folder among a release's other files, read-only, with links and a pipe."""
    folder = tmp_path / "release"
    small_dataset.tokenizer.save(tmp_path / "elsewhere")
    folder.mkdir()
    (folder / "spm.model").symlink_to(tmp_path / "elsewhere" / "spm.model")
    (folder / "config.json").write_text(json.dumps({"vocab_size": small_dataset.tokenizer.vocab_size + 100}))
    (folder / ".env").write_text("TOKEN=1")
    write_files(folder / ".git", {"config": b"[remote]"})
    os.mkfifo(folder / "training_args.bin")
    os.mkfifo(folder / "vocab.json")
    for path in (tmp_path / "elsewhere" / "spm.model", folder):
        path.chmod(0o500)
    return folder


def test_a_folder_is_prepared_and_taken_over(source, tmp_path, warnings):
    folder = RunFolder(tmp_path / "run")
    config = load_run_config("debug", ["train.steps=50"])
    folder.prepare(config, source, {"world_size": 2})
    assert load_run_config(folder.config) == config
    assert json.loads(folder.environment.read_text())["world_size"] == 2
    assert Tokenizer.load(folder.tokenizer).fingerprint == Tokenizer.load(source).fingerprint
    assert not folder.state_file.exists()
    folder.write_state("running")
    assert folder.state_file.read_text() == "running\n"
    folder.prepare(config, source, {})
    assert "changed configuration" not in warnings.text
    changes = ["train.steps=60", "checkpoint.interval=256", "data.valid=held/out"]
    folder.prepare(load_run_config("debug", changes), source, {})
    # 256 is what another section's key has, too: a change is told by its key, not by its text.
    for change in ("train.steps = 60 (was 50)", "checkpoint.interval = 256 (was 100)", "data.valid = 'held/out'"):
        assert change in warnings.text


def test_of_a_folder_only_the_tokenizers_own_contents_are_copied_and_can_be_replaced(source, tmp_path):
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):  # a read-only copy is replaced, too
        folder.prepare(load_run_config("debug"), source, {})
        copies = list(folder.tokenizer.iterdir())
        assert sorted(path.name for path in copies) == ["spm.model", "tokenizer_settings.json"]
        assert all(path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o200 for path in copies)
        folder.tokenizer.chmod(0o500)
    assert Tokenizer.load(folder.tokenizer).fingerprint == Tokenizer.load(source).fingerprint


def test_a_full_disk_at_the_tokenizers_copy_is_told_in_words(source, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deberta_xl.data.tokenizer.write_files", refuse)
    with pytest.raises(ConfigError, match=r"tokenizer cannot be written: No space left on device; mend that"):
        folder.prepare(load_run_config("debug"), source, {})


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


@pytest.mark.parametrize("first_step", [0, 2])
def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path, first_step):
    # Without a checkpoint (first_step 0) the run starts over, and what it wrote before is as void as after a later one.
    for first, value in ((0, 1.0), (first_step, 2.0)):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", first_step=first, total_steps=4)
        for step in range(first + 1, 5):
            writer.write(step, {"loss": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [
        (step, 1.0 if step <= first_step else 2.0) for step in (1, 2, 3, 4)
    ]


def test_metrics_that_are_not_even_text_do_not_keep_a_run_from_resuming(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 3.0}\n\xe0\x00\xff\n{"step": 2')
    MetricsWriter(file, tmp_path / "tensorboard", first_step=1, total_steps=4).close()
    assert file.read_text() == '{"step": 1, "loss": 3.0}\n'


def test_metrics_that_cannot_be_written_are_an_error_for_people(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", first_step=0, total_steps=4)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written: .*the same command continues"):
        writer.write(1, {"loss": 1.0})
    writer.close()


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path, warnings):
    folder = RunFolder(tmp_path / "run")
    first, last = (folder.checkpoints / name for name in ("step-00000003", "step-00000006"))
    first.mkdir(parents=True)
    last.mkdir()
    folder.check_latest(None)  # nothing was saved yet
    folder.write_latest(first)
    folder.check_latest(last)  # ended between saving and noting it
    folder.write_latest(last)
    folder.check_latest(first)  # passed over because it is damaged: said already
    assert not warnings.text
    last.rmdir()
    folder.check_latest(first)
    assert "step-00000006, the checkpoint saved last, is missing; using" in warnings.text
    with pytest.raises(ConfigError, match="trained up to step-00000006"):
        folder.check_latest(None)


def test_a_configuration_that_cannot_be_read_is_replaced_with_a_warning(source, tmp_path, warnings):
    folder, config = RunFolder(tmp_path / "run"), load_run_config("debug")
    folder.path.mkdir()
    folder.config.write_text("[train]\nanother_versions_key = 3\n")
    folder.prepare(config, source, {})
    assert "another_versions_key" in warnings.text
    assert load_run_config(folder.config) == config


def test_a_full_disk_leaves_the_old_small_file_and_no_other(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_state("running")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _descriptor: raise_full())
        with pytest.raises(ConfigError, match="STATE cannot be written: No space left"):
            folder.write_state("done")
    assert [path.name for path in tmp_path.iterdir()] == ["STATE"]
    assert folder.state_file.read_text() == "running\n"


def raise_full() -> None:
    """What the system says to a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_loss_curve_is_a_picture(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    lines += [{"step": 2, "valid_loss": 2.5, "valid_unigram_entropy": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png", loss_curves)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_heartbeat_tells_step_and_phase_while_the_rank_works(tmp_path):
    heartbeat = Heartbeat(tmp_path, rank=3, ownership=Ownership(tmp_path / "OWNER", "nobody else"))
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
    check_fingerprints(saved, saved | {"objective": "masked_lm"})  # older than the choice
    with pytest.raises(ConfigError, match=r"another objective: was 'masked_lm', now 'mine:Whole'"):
        check_fingerprints(saved, saved | {"objective": "mine:Whole"})
    with pytest.raises(ConfigError, match=r"num_layers was 2, now 3"):
        check_fingerprints(saved, saved | {"architecture": {"num_layers": 3, "hidden_size": 8}})


def test_another_seed_is_refused_where_the_checkpoint_tells_its_own():
    current = {"data": "abc", "seed": 2}
    check_fingerprints({"data": "abc"}, current)  # older than that
    check_fingerprints(current, current)
    with pytest.raises(ConfigError, match=r"made with another seed: was 1, now 2; start another run\.folder"):
        check_fingerprints({"data": "abc", "seed": 1}, current)


def test_fewer_steps_than_the_checkpoint_has_are_refused():
    check_last_step(5, 5)
    with pytest.raises(ConfigError, match=r"train\.steps=2, .* step 5"):
        check_last_step(5, 2)


def test_the_state_advances_by_whole_steps():
    state = TrainState()
    state.advance(8)
    state.advance(8)
    assert (state.step, state.consumed_samples) == (2, 16)


@pytest.mark.parametrize("had_a_file", [False, True])
def test_a_refused_start_leaves_no_run_folder_but_what_was_there(source, tmp_path, had_a_file):
    folder = RunFolder(tmp_path / "run")
    if had_a_file:
        write_files(folder.path, {"slurm/nodes": b"node1", "log/job.out": b"started"})
    before = sorted(tmp_path.rglob("*"))
    is_first = folder.is_unused()
    folder.prepare(load_run_config("debug"), source, {})
    folder.owner.write_text("me\n")
    (folder.log / "rank-00000.log").touch()
    ownership = Ownership(folder.owner, "me")
    start = Start(None, folder, is_first, None, ownership, Heartbeat(folder.heartbeat, 0, ownership))
    with pytest.raises(ConfigError), start.undone_when_refused():
        raise ConfigError("no such weights")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_start_leaves_a_folder_that_a_run_had_used_or_that_another_start_has_taken(source, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(load_run_config("debug"), source, {})
    folder.owner.write_text("another\n")
    for is_first in (folder.is_unused(), True):
        start = Start(None, folder, is_first, None, Ownership(folder.owner, "me" if is_first else "another"), None)
        with pytest.raises(ConfigError), start.undone_when_refused():
            raise ConfigError("no such weights")
        assert folder.config.exists()
