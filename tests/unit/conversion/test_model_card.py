"""Model cards: valid front matter and Markdown whatever stands in them, and examples that run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from test_task_export import CASES, fine_tuned

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.card_example import fill_mask_example
from deberta_xl.conversion.card_metadata import CardMetadata, base_model_of, front_matter, read_metadata
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.model_card import plain, table
from deberta_xl.conversion.task_export import export_task
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.presets import load_run_config, to_toml

NASTY = (
    "no",
    "a | b",
    'say "hi" \\ bye',
    "line\nbreak",
    "東京 🚀",
    "\x85\u2028\x7f\U000e0001",
    ": - #",
    "",
    "null",
    "1.0",
)


def read_card(folder: Path) -> tuple[dict[str, object], str]:
    """Front matter and text of a folder's card."""
    _, matter, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(matter), text


def run_example(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example of a card prints when it is run in its folder."""
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(program, {})
    return capsys.readouterr().out


def test_front_matter_is_yaml_that_reads_back_as_it_was_given():
    read = yaml.safe_load(front_matter({"title": NASTY[2], "tags": NASTY, "none": ()}).split("---\n")[1])
    assert read == {"title": NASTY[2], "tags": list(NASTY)}
    assert "license: cc-by-4.0" in front_matter({"license": "cc-by-4.0"})  # quoted only where that is needed


def test_a_cell_of_a_table_stays_one_cell():
    rows = list(table({"c2p|p2c": "a|b\nc", "path": "x\\|y", "html": "<b>*no*</b>"}))
    assert rows[1:] == [
        r"| c2p\|p2c | a\|b c |", r"| path | x\\\|y |", r"| html | \<b\>\*no\*\</b\> |",
    ]  # fmt: skip
    for row in rows[1:]:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


def test_an_example_that_could_not_run_is_refused():
    assert "tokenizer('Ein [MASK].'," in fill_mask_example(None, "Ein [MASK].")
    with pytest.raises(CheckpointError, match=r"write \[MASK\] for one word"):
        fill_mask_example(None, "Ein Satz.")


def test_metadata_comes_from_options_and_toml_and_the_later_wins(tmp_path):
    toml = tmp_path / "card.toml"
    toml.write_text('\ufefflicense = "mit"\nlanguage = ["ja", "no"]\ntitle = "日本 | \\"BERT\\""\n', encoding="utf-8")
    given = ["license=apache-2.0", "datasets=a/b, c", "base_model=microsoft/x=y", "description=What is in card.toml"]
    metadata = read_metadata([str(toml), *given])
    assert metadata == CardMetadata(
        title='日本 | "BERT"', license="apache-2.0", language=("ja", "no"), datasets=("a/b", "c"),
        base_model=("microsoft/x=y",), description="What is in card.toml",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("licence=mit", "unknown key 'licence' of a model card; did you mean 'license'"),
        ("license=The MIT License", "no identifier of the Hub's"),
        ("language=English", "no code of a language"),
        ("title=", "title is a text"),
        ("nowhere.toml", "nowhere.toml cannot be read"),
    ],
)
def test_metadata_that_cannot_be_meant_is_refused(option, words):
    with pytest.raises(CheckpointError, match=words):
        read_metadata([option])


def test_toml_of_another_type_is_refused(tmp_path):
    (tmp_path / "card.toml").write_text("tags = 3")
    with pytest.raises(CheckpointError, match="tags is a text or a list of texts, not 3"):
        read_metadata([str(tmp_path / "card.toml")])


def test_the_base_model_is_named_without_the_paths_of_the_machine(tmp_path):
    cached = "/home/me/.cache/huggingface/hub/models--microsoft--deberta-v3-base/snapshots/abc"
    assert base_model_of(cached) == "microsoft/deberta-v3-base"
    assert base_model_of("/home/me/runs/first/checkpoints/step-00001000") == "first"
    assert base_model_of("/home/me/runs/sst2/best") == "sst2"
    assert base_model_of("downloads/deberta-v3-large/") == "deberta-v3-large"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "org/name"}))
    assert base_model_of(str(tmp_path)) == "org/name"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "/home/me/private"}))
    (tmp_path / "conversion.json").write_text(json.dumps({"source": "mdeberta"}))
    assert base_model_of(str(tmp_path)) == "mdeberta"


def test_the_card_of_a_run_states_metadata_and_what_it_began_from_and_its_example_runs(
    small_dataset, tmp_path, monkeypatch, capsys
):
    config = DebertaConfig(
        vocab_size=small_dataset.tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
        max_position_embeddings=32, position_buckets=8,
    )  # fmt: skip
    small_dataset.tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "a | b" / "checkpoints" / "step-00000003"
    DebertaForMaskedLM(config).save_pretrained(folder, tokenizer=tmp_path / "tokenizer")
    settings = to_toml(load_run_config("debug", ["train.init=/home/me/deberta-v3-small"]))
    (tmp_path / "a | b" / "config.toml").write_text(settings)
    metadata = CardMetadata(license="mit", language=("no",), tags=("a: b",))
    convert(folder, tmp_path / "out", Conversion(to="huggingface", with_card=True, metadata=metadata))
    matter, text = read_card(tmp_path / "out")
    assert matter == {
        "license": "mit", "language": ["no"], "base_model": "deberta-v3-small", "library_name": "transformers",
        "pipeline_tag": "fill-mask", "tags": ["deberta", "fill-mask", "a: b"],
    }  # fmt: skip
    assert "# a \\| b\n" in text
    assert r"| model.pos_att_type | c2p\|p2c |" in text
    assert "/home/me" not in text
    assert len(run_example(text, tmp_path / "out", monkeypatch, capsys).splitlines()) == 5


@pytest.mark.parametrize("kind", CASES)
def test_a_fine_tuned_model_gets_a_card_whose_example_runs_and_is_verified(
    kind, small_dataset, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    fine_tuned(kind, small_dataset, run / "best")
    (run / "config.toml").write_text('[train]\ninit = "/home/me/base"\nseed = 3\n[task]\ndata = "/home/me/data"\n')
    results = {"best_step": 7, "seed": 3, "metrics": {"valid": {"accuracy": 0.91234, "f1": None}}}
    (run / "results.json").write_text(json.dumps(results))
    said: list[str] = []
    conversion = Conversion(to="huggingface", with_card=True, tolerance=1e-6, show=said.append)
    export_task(run / "best", tmp_path / "out", conversion)
    assert said[-1].startswith("verified: the logits differ by 0.0e+00")
    matter, text = read_card(tmp_path / "out")
    assert matter["base_model"] == "base"
    assert "| valid: accuracy | 0.9123 |" in text
    assert "| valid: f1 | undefined |" in text
    assert "/home/me" not in text
    for label in CASES[kind][0]:
        assert label in text
    assert run_example(text, tmp_path / "out", monkeypatch, capsys) or kind == "span"


def test_a_written_task_that_computes_something_else_is_refused_and_not_kept(small_dataset, tmp_path, monkeypatch):
    fine_tuned("classification", small_dataset, tmp_path / "ours")
    monkeypatch.setattr("deberta_xl.conversion.task_export.activation_there", lambda act: "tanh")
    with pytest.raises(CheckpointError, match="differs from its source: the logits"):
        export_task(tmp_path / "ours", tmp_path / "out", Conversion(to="huggingface", tolerance=1e-6))
    assert not (tmp_path / "out").exists()
    assert DebertaForTask.from_pretrained(tmp_path / "ours").head.pooler_act == "gelu"


def test_plain_text_is_one_line():
    assert plain("a\n\n b") == "a b"
