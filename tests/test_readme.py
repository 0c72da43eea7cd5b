"""The README's commands run, and its numbers are right."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from documented import ROOT, TINY, commands, link_checkout, made_small, run
from small_dataset import documents
from small_task import write_sentences

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.parts import masked_lm_parts, num_parameters, replaced_tokens_parts
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.settings.presets import load_run_config, preset_names

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {"128100": "600", "xxlarge": "debug"}


def section(title: str) -> str:
    """The text below a heading."""
    return README.split(f"## {title}")[1].split("\n## ")[0].partition("In Python:")[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository's root, with a compressed corpus in it."""
    (tmp_path / "corpus").mkdir()
    for number in range(2):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents()[number::2])
        (tmp_path / "corpus" / f"{number}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return link_checkout(tmp_path)


def test_the_commands_from_text_to_model_to_task_run_as_they_stand(checkout):
    ran = []
    (checkout / "glue").mkdir()
    write_sentences(checkout / "glue" / "SST-2")
    (checkout / "reviews.jsonl").write_text('{"text": "A joy."}\n')
    for command in [*commands(section("From text to model")), *commands(section("From model to task"))]:
        if command[0] == "tensorboard":  # a server; what it reads is checked where a run's folder is
            continue
        run(made_small(command, SMALLER), checkout)
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
    work = ["--folder", str(tmp_path / "work"), "--corpus", str(tmp_path / "own.txt"), "--vocab_size", "600"]
    tiny = [override for override in TINY if not override.startswith("train.steps")]
    for steps, sign in (("2", "== 3. Dataset"), ("4", "resumed from")):
        said = run([sys.executable, "tools/quickstart.py", *work, "--", *tiny, f"train.steps={steps}"], ROOT)
        assert sign in said
        assert "== Done in" in said
        assert "in sentences that were held out; hidden: " in said
        assert "[MASK]" in said
    assert ("bin/activate" in said) == (Path(sys.prefix) / "bin" / "activate").exists()
    assert (tmp_path / "work" / "huggingface" / "tokenizer.json").exists()
    assert (tmp_path / "work" / "run" / "loss.png").exists()


def test_the_table_of_presets_is_right():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\S+) \| ([^|]+) \|$", README, re.MULTILINE)
    for name, layers, hidden, heads, inner, convolution, parameters in rows:
        section = load_run_config(name).model
        assert sizes_of(section) == tuple(map(int, (layers, hidden, heads, inner)))
        assert section.conv_kernel_size == (0 if convolution == "–" else int(convolution))
        if parameters[0].isdigit():
            with torch.device("meta"):
                model = MaskedLanguageModel(section.architecture(128_001))
            assert sum(p.numel() for p in model.parameters()) == number(parameters)
    of_v3 = [row[0] for row in rows_of_v3()]
    assert sorted([*(row[0] for row in rows), *of_v3]) == preset_names()


def test_the_table_of_v3s_presets_is_right():
    for name, layers, hidden, heads, inner, vocabulary, generator_layers, *parameters in rows_of_v3():
        config = load_run_config(name)
        architecture = config.model.architecture(128_001)
        generator = generator_architecture(architecture, config.generator)
        assert sizes_of(config.model) == tuple(map(int, (layers, hidden, heads, inner)))
        assert generator.num_layers == int(generator_layers)
        if vocabulary[0].isdigit():
            assert number(vocabulary) == config.model.vocab_size
            of_generator = num_parameters(masked_lm_parts(generator))
            both = num_parameters(replaced_tokens_parts(architecture, generator, config.replaced_tokens.sharing))
            assert [of_generator, both - of_generator] == [number(cell) for cell in parameters]


def rows_of_v3() -> list[tuple[str, ...]]:
    """The cells of the second table of presets."""
    cells = r" \| ".join([r"(\d+)"] * 4 + [r"([^|]+)", r"(\d+)", r"([^|]+)", r"([^|]+)"])
    return re.findall(rf"^\| `(\w+)` \| {cells} \|$", README, re.MULTILINE)


def sizes_of(section: DebertaConfig) -> tuple[int, ...]:
    """Layers, hidden, heads, feed-forward."""
    return section.num_layers, section.hidden_size, section.num_heads, section.intermediate_size


def number(cell: str) -> int:
    """`1,000` as a number."""
    return int(cell.replace(",", ""))


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
