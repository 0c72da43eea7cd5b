"""The README's commands run, and its numbers are right."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from small_dataset import documents
from small_task import write_sentences

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.presets import load_run_config, preset_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIG, SMALL = "128100", "600"
TINY = [
    "model.vocab_size=none", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "train.steps=4",
    "model.intermediate_size=64", "model.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=4",
    "schedule.warmup_steps=2",
]  # fmt: skip

TINY_TASK = ["model.sequence_length=32", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=4"]


def commands(title: str) -> list[list[str]]:
    """The commands of a section, continuation lines joined."""
    section = README.split(f"## {title}")[1].split("\n## ")[0]
    block = re.search(r"((?:    .*\n)+)", section).group(1).replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines()]


def made_small(command: list[str]) -> list[str]:
    """The same command at a size for tests."""
    words = [{BIG: SMALL, "xxlarge": "debug"}.get(word, word) for word in command]
    if words[0] == "deepspeed":
        tiny = TINY if "deberta_xl/pretrain.py" in words else TINY_TASK
        return [words[0], "--master_port", str(29500 + os.getpid() % 1000), *words[1:], *tiny]
    return [sys.executable, *words[1:]] if words[0] == "python" else words


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository's root, with a compressed corpus in it."""
    for name in ("tools", "deberta_xl", "deepspeed_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus").mkdir()
    for number in range(2):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents()[number::2])
        (tmp_path / "corpus" / f"{number}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return tmp_path


def test_the_commands_from_text_to_model_to_task_run_as_they_stand(checkout):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ran = []
    (checkout / "glue").mkdir()
    write_sentences(checkout / "glue" / "SST-2")
    (checkout / "reviews.jsonl").write_text('{"text": "A joy."}\n')
    for command in [*commands("From text to model"), *commands("From model to task")]:
        if command[0] == "tensorboard":  # a server; what it reads is checked where a run's folder is
            continue
        result = subprocess.run(
            made_small(command), cwd=checkout, env=environment, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}"
        ran.append(next(Path(word).name for word in command if word.endswith(".py")))
    assert {"train_tokenizer.py", "preprocess.py", "pretrain.py", "evaluate.py", "fill_mask.py", "convert.py"} <= set(
        ran
    )
    assert {"finetune.py", "evaluate_task.py", "predict.py"} <= set(ran)
    for folder in ("exported", "exported-sst2"):
        assert (checkout / folder / "model.safetensors").exists()
    assert json.loads((checkout / "labels.jsonl").read_text())["prediction"] in ("0", "1")


def test_the_quickstart_goes_from_text_to_filled_masks_and_continues(tmp_path):
    (tmp_path / "own.txt").write_text("\n\n".join(documents()), encoding="utf-8")
    work = ["--folder", str(tmp_path / "work"), "--corpus", str(tmp_path / "own.txt"), "--vocab_size", SMALL]
    tiny = [override for override in TINY if not override.startswith("train.steps")]
    for steps, sign in (("2", "== 3. Dataset"), ("4", "resumed from")):
        command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), *work, "--", *tiny, f"train.steps={steps}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            command, env=environment, text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert result.returncode == 0, result.stdout
        assert sign in result.stdout
        assert "== Done in" in result.stdout
        assert "in sentences that were held out; hidden: " in result.stdout
        assert "[MASK]" in result.stdout
    assert ("bin/activate" in result.stdout) == (Path(sys.prefix) / "bin" / "activate").exists()
    assert (tmp_path / "work" / "huggingface" / "tokenizer.json").exists()
    assert (tmp_path / "work" / "run" / "loss.png").exists()


def test_the_table_of_presets_is_right():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\S+) \| ([^|]+) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == sorted(preset_names(), key=[row[0] for row in rows].index)
    for name, layers, hidden, heads, inner, convolution, parameters in rows:
        section = load_run_config(name).model
        sizes = (section.num_layers, section.hidden_size, section.num_heads, section.intermediate_size)
        assert sizes == tuple(map(int, (layers, hidden, heads, inner)))
        assert section.conv_kernel_size == (0 if convolution == "–" else int(convolution))
        if parameters[0].isdigit():
            with torch.device("meta"):
                model = MaskedLanguageModel(section.architecture(128_001))
            assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", ""))


def test_every_file_the_documents_point_to_exists():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_every_file_of_ours_that_a_text_names_is_there():
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("deberta_xl", "tools", "benchmarks", "slurm", "docs", "deepspeed_configs"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".md", ".toml")]
    for text in texts:
        for path in re.findall(r"(?<![\w./-])\w+/[\w./]+\.(?:py|sh|md)\b", text.read_text(encoding="utf-8")):
            roots = [root for root in (ROOT, ROOT / "deberta_xl") if (root / path.partition("/")[0]).is_dir()]
            is_there = any((root / path).exists() for root in roots)
            assert is_there or not roots or "NAME" in path, f"{text} names {path}"
