"""The reference of settings, in docs/ and in --help, and all commands under one name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_xl.commands import dispatch
from deberta_xl.commands.pretraining import parse_arguments
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import load_config, load_run_config, section_types
from deberta_xl.settings.pretraining import RunConfig
from deberta_xl.settings.reference import settings_of

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `deberta-xl` with words; its status, and what it said on each stream."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)

    def words(*arguments: str) -> tuple[int, str, str]:
        status = dispatch.main(arguments)
        return status, *capsys.readouterr()

    return words


@pytest.mark.parametrize("root", [RunConfig, FinetuneConfig])
def test_every_key_has_a_type_and_a_meaning(root):
    for name, section in section_types(root).items():
        settings = settings_of(section)
        assert [setting.key for setting in settings] == [field.name for field in dataclasses.fields(section)]
        for setting in settings:
            assert setting.kind, f"{name}.{setting.key}"
            assert setting.meaning, f"{name}.{setting.key} has no sentence under it"


def test_the_reference_knows_types_defaults_and_bounds():
    train = {setting.key: setting for setting in settings_of(section_types()["train"])}
    assert train["steps"][1:4] == ("whole number", "1000", "at least 1")
    assert train["init"][1:4] == ("path or none", "unset", "")
    schedule = {setting.key: setting for setting in settings_of(section_types()["schedule"])}
    assert schedule["decay"][1:4] == ("text", '"linear"', "linear, cosine, constant")


@pytest.mark.parametrize(
    ("topic", "words", "others"),
    [
        ("schedule", ["[schedule]", "warmup_steps = 0", "whole number, at least 0"], ["[train]"]),
        ("train.steps", ["steps = 1000", "Optimizer updates."], ["seed"]),
        ("all", ["[run]", "[evaluation]", "c2p|p2c"], []),
    ],
)
def test_help_shows_a_section_a_key_or_all(topic, words, others, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help", topic])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in words)
    assert not any(word in said for word in others)


def test_help_on_what_is_no_section_names_the_nearest(capsys):
    for topic, nearest in (("trian", "did you mean 'train'?"), ("train.stepz", "did you mean 'steps'?")):
        with pytest.raises(SystemExit) as end:
            parse_arguments(["--help", topic])
        assert end.value.code == 2
        assert nearest in capsys.readouterr().err


def test_the_printed_configuration_is_read_back_equal(run, tmp_path):
    overrides = ["train.steps=70", 'run.folder=東京 "a"', "schedule.warmup_steps=3"]
    status, printed, _ = run("pretrain", "--config", "base", "--print-config", *overrides)
    assert status == 0
    (tmp_path / "printed.toml").write_text(printed, encoding="utf-8")
    assert load_run_config(tmp_path / "printed.toml") == load_run_config("base", overrides)
    status, printed, _ = run("finetune", "--config", "finetune_sift", "--print-config", "--task", "sst2")
    (tmp_path / "printed.toml").write_text(printed, encoding="utf-8")
    expected = load_config("finetune_sift", ["task.name=sst2"], FinetuneConfig)
    assert load_config(tmp_path / "printed.toml", [], FinetuneConfig) == expected


def test_a_mistake_in_the_configuration_is_not_printed(run):
    status, printed, said = run("pretrain", "--config", "base", "--print-config", "train.stepz=70")
    assert (status, printed) == (2, "")
    assert "did you mean 'steps'?" in said


def test_every_tool_is_a_command(run):
    status, said, _ = run("--help")
    assert status == 0
    for name in (
        "pretrain",
        "finetune",
        "preprocess",
        "train-tokenizer",
        "evaluate",
        "predict",
        "convert",
        "fill-mask",
    ):
        assert f"\n  {name} " in said
    status, said, _ = run("table", "--help")
    assert status == 0
    assert "One table over fine-tuning runs" in said
    assert run("table", "nowhere")[::2] == (2, "error: no finished fine-tuning run in nowhere\n")


def test_a_mistyped_command_names_the_nearest_and_where_the_tools_are(run, monkeypatch):
    status, _, said = run("pretain")
    assert (status, said) == (2, "error: no command 'pretain'; did you mean 'pretrain'?\n")
    monkeypatch.setattr(dispatch, "TOOLS", Path("/nowhere/tools"))
    assert "the tools stand in a clone of the repository (pip install -e)" in run("convert")[2]


def test_ranks_start_the_launcher_quietly_and_a_check_of_ranks_none(run, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words) or 0)
    monkeypatch.setattr(dispatch, "choose_accelerator", lambda: None)
    run("pretrain", "--ranks", "2", "--config", "debug", "train.steps=5")
    (words,) = started
    assert words[1:6] == ["-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2"]
    assert words[-4:] == [str(ROOT / "deberta_xl" / "pretrain.py"), "--config", "debug", "train.steps=5"]
    status, _, said = run("finetune", "--ranks=zwei", "--config", "finetune")
    assert status == 2
    assert said.startswith("error: --ranks zwei: a number of ranks")
    status, _, said = run("pretrain", "--check", "--ranks", "2", "--config", "nowhere", "--deepspeed_config", "x.json")
    assert status == 2
    assert "no such preset" in said
    assert len(started) == 1


def test_the_commands_need_no_installation():
    command = [sys.executable, "-m", "deberta_xl.commands", "pretrain", "--help", "train.steps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Optimizer updates." in done.stdout
