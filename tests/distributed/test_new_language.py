"""docs/new_language.md: every command is one that its script takes, and they all run, in an order that works."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
from documented import ROOT, commands, fenced, link_checkout, made_small, run
from languages import texts_in

GUIDE = (ROOT / "docs" / "new_language.md").read_text(encoding="utf-8")
NOT_RUN = ("hf", "tensorboard")
"""What needs an account, and a server."""
SMALLER = {"32000": "400"}


def parse(script: str, arguments: list[str]) -> None:
    """What the script's own parser makes of its arguments; it exits where it does not know one."""
    name = {"deberta_xl/pretrain.py": "pretraining", "deberta_xl/finetune.py": "finetuning"}.get(script)
    place = f"deberta_xl.commands.{name}" if name else script.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(place)
    parsed = module.parse_arguments(arguments)
    if name:
        module.read_config(parsed.config, parsed.overrides)


@pytest.mark.parametrize("command", [c for c in commands(GUIDE) if c[0] not in NOT_RUN], ids=shlex.join)
def test_every_command_of_the_guide_is_one_that_its_script_takes(command):
    place = next(n for n, word in enumerate(command) if word.endswith(".py"))
    assert command[0] in ("python", "deepspeed")
    parse(command[place], command[place + 1 :])


def test_what_is_not_run_is_known():
    words = [command[:2] for command in commands(GUIDE) if command[0] in NOT_RUN]
    assert words == [["tensorboard", "--logdir"], ["hf", "auth"], ["hf", "upload"]]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """A line for each."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("language", ["Japanese"])
def test_the_guide_leads_from_text_without_spaces_to_a_model_that_transformers_loads(tmp_path, language):
    texts, checkout = texts_in(language), link_checkout(tmp_path)
    for number in range(2):
        write_jsonl(checkout / "corpus" / f"{number}.jsonl", [{"text": text} for text in texts[number::2]])
    for name, start in (("train", 0), ("valid", 60)):
        rows = [{"text": text[:40], "label": str(n % 2)} for n, text in enumerate(texts[start : start + 60])]
        write_jsonl(checkout / "task" / f"{name}.jsonl", rows)
    write_jsonl(checkout / "new.jsonl", [{"text": texts[-1][:40]}])
    (checkout / "task.toml").write_text(*fenced(GUIDE, "toml"))
    said = {}
    for command in commands(GUIDE):
        if command[0] not in NOT_RUN:
            said[shlex.join(command)] = run(made_small(command, SMALLER), checkout)
    program = next(fenced(GUIDE, "python")).replace("…", texts[0][:20])
    assert "torch.Size([1, " in run([sys.executable, "-c", program], checkout)
    assert json.loads((checkout / "labels.jsonl").read_text())["prediction"] in ("0", "1")
    assert "\nlanguage:\n- is\n" in (checkout / "exported" / "README.md").read_text()
