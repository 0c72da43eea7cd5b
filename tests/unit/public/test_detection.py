"""Finding replaced tokens: what is said of each, how it is shown, and who cannot say it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vectors import vector_folders

from deberta_xl.base.command_line import run_tool
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.replaced_tokens import ReplacedTokenModel
from deberta_xl.public.detection import (
    DebertaForDetection,
    DetectionError,
    Found,
    JudgedToken,
    detect,
    detect_all,
    stretches,
)
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native import write_weights
from deberta_xl.weights.native_config import Learnt, native_config
from tools import detect as tool


@pytest.fixture(scope="module")
def tokenizer(small_dataset) -> Tokenizer:
    return small_dataset.tokenizer


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A pair of tiny models whose judgements depend on everything."""
    config = DebertaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48,
        max_position_embeddings=48, position_buckets=8,
    )  # fmt: skip
    model = ReplacedTokenModel(config, config, "gdes")
    draw = torch.Generator().manual_seed(1)
    weights = {name: p.detach() + 0.3 * torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}
    place = tmp_path_factory.mktemp("detection")
    tokenizer.save(place / "tokenizer")
    facts = native_config(config, generator=config, sharing="gdes", learnt=Learnt(sequence_length=40))
    write_weights(place / "v3", weights, facts, place / "tokenizer")
    return place / "v3"


@pytest.mark.parametrize("vector", vector_folders("rtd"), ids=lambda folder: folder.name)
def test_the_originals_discriminator_says_what_it_said_there(vector, tmp_path):
    fields = json.loads((vector / "config.json").read_text())
    tensors = load_file(vector / "weights.safetensors")
    for part, (config, weights) in {
        "discriminator": ("config.json", "pytorch_model.bin"),
        "generator": ("generator_config.json", "pytorch_model.generator.bin"),
    }.items():
        own = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        if fields["embedding_sharing"] == "es":  # the first forward pass puts the generator's in their place
            shared = "deberta.embeddings.word_embeddings.weight"
            own[shared] = tensors[f"generator.{shared}"]
        (tmp_path / config).write_text(json.dumps(fields[part]))
        torch.save(own, tmp_path / weights)
    inputs, outputs = load_file(vector / "inputs.safetensors"), load_file(vector / "outputs.safetensors")
    model = DebertaForDetection.from_pretrained(tmp_path, dtype=torch.float64)
    # The merged tables of the file are sums in float32.
    tolerance = 1e-10 if fields["embedding_sharing"] == "es" else 1e-5
    mask = inputs["attention_mask"]
    with torch.no_grad():
        logits = model(outputs["discriminator_input_ids"], mask)
    assert (logits - outputs["discriminator_logits"])[mask > 0].abs().max() <= tolerance


def test_a_probability_for_each_token_is_that_of_the_model(folder, tokenizer):
    model = DebertaForDetection.from_pretrained(folder)
    text = "the class of  a function"
    judged = detect(model, tokenizer, text)
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(text).tolist(), tokenizer.sep_id]])
    with torch.no_grad():
        expected = model(ids)[0, 1:-1].sigmoid().tolist()
    assert [token.probability for token in judged] == expected
    assert [token.piece for token in judged] == [tokenizer.id_to_piece(i) for i in tokenizer.encode(text).tolist()]
    assert "".join(text[token.start : token.end] for token in judged) == text.replace(" ", "")
    assert len(set(expected)) == len(expected)


def test_many_texts_are_judged_as_each_alone_in_their_order(folder, tokenizer, monkeypatch):
    monkeypatch.setattr("deberta_xl.public.detection.CHUNK", 4)
    model = DebertaForDetection.from_pretrained(folder)
    texts = ["the class of a function " * number for number in (1, 5, 2, 5, 3, 1)]
    for text, judged in zip(texts, detect_all(model, tokenizer, texts), strict=True):
        alone = detect(model, tokenizer, text)
        assert [token[:3] for token in judged] == [token[:3] for token in alone]
        # The same float32 numbers, summed in another order beside padding.
        expected = [token.probability for token in alone]
        assert [token.probability for token in judged] == pytest.approx(expected, abs=2e-6)


def test_neighbouring_tokens_are_found_together(folder):
    judged = [
        JudgedToken("▁the", 0, 3, 0.1),
        JudgedToken("▁", 4, 4, 0.9),
        JudgedToken("ban", 4, 7, 0.6),
        JudgedToken("ana", 7, 10, 0.8),
        JudgedToken("▁is", 11, 13, 0.7),
        JudgedToken("▁it", 14, 16, 0.2),
    ]
    assert stretches(judged, 0.5) == [Found(4, 10, 0.8), Found(11, 13, 0.7)]
    assert stretches(judged, 0.95) == []


@pytest.mark.parametrize(
    "text", ["die Banane", "عاصمة فرنسا موزة", "首都是香蕉", "เมืองหลวง", "राजधानी केला", "e\u0301 👩‍👧"]
)
def test_any_script_is_shown_with_plain_marks_and_unharmed(text):
    judged = [JudgedToken("x", number, number + 1, 0.25) for number in range(len(text))]
    judged[-2] = judged[-2]._replace(probability=0.75)
    lines = tool.shown(text, judged, stretches(judged, 0.5), tool.PLAIN).splitlines()
    assert lines == [f"{text[:-2]}[[{text[-2]}]]{text[-1]}", f"  75.00%  {text[-2]}"]
    nothing = tool.shown(text, judged, [], tool.PLAIN).splitlines()
    assert nothing[0] == text
    assert nothing[1].startswith(f"  75.00%  {text[-2]}  (nothing found;")


def test_the_tool_marks_plainly_without_a_terminal_and_colours_on_one(folder, capsys, monkeypatch):
    arguments = tool.parse_arguments([str(folder), "the class of a function", "--threshold", "0.01"])
    assert run_tool(tool.run, arguments) == 0
    plain = capsys.readouterr().out
    assert "[[" in plain
    assert "\x1b" not in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run_tool(tool.run, arguments) == 0
    coloured = capsys.readouterr().out
    assert coloured.replace(tool.COLOURED[0], "[[").replace(tool.COLOURED[1], "]]") == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_tool(tool.run, arguments) == 0
    assert capsys.readouterr().out == plain


def test_a_line_of_json_has_every_token(folder, capsys):
    text = "the class of é"
    arguments = tool.parse_arguments([str(folder), text, "--threshold", "0.01", "--json"])
    assert run_tool(tool.run, arguments) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    fields = json.loads(out)
    assert fields["text"] == text
    assert all(text[found["start"] : found["end"]] == found["text"] for found in fields["replaced"])
    assert [token["piece"] for token in fields["tokens"]][:2] == ["▁the", "▁class"]


def complaint(capsys, *arguments: str) -> str:
    """The tool's one line of error."""
    assert run_tool(tool.run, tool.parse_arguments(list(arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_who_has_no_such_head_says_what_it_can_do(folder, capsys, tmp_path):
    generator = complaint(capsys, str(folder / "generator"), "the class")
    assert "has no head that finds replaced tokens" in generator
    assert f"tools/fill_mask.py {folder / 'generator'}" in generator
    DebertaForMaskedLM.from_pretrained(folder / "generator").save_pretrained(tmp_path / "mlm")
    assert "train.objective=replaced_tokens" in complaint(capsys, str(tmp_path / "mlm"), "the class")


def test_a_text_longer_than_the_rows_of_the_training_is_looked_through_with_a_warning(folder, tokenizer, caplog):
    model = DebertaForDetection.from_pretrained(folder)
    for words in (38, 39):
        assert not caplog.messages
        assert len(detect(model, tokenizer, "the " * words)) == words
    assert "the text has 41 tokens, and the model was trained on rows of 40" in caplog.text


def test_what_cannot_be_looked_through_is_refused(folder, tokenizer, capsys):
    model = DebertaForDetection.from_pretrained(folder)
    with pytest.raises(DetectionError, match="the text is empty"):
        detect(model, tokenizer, "  ")
    with pytest.raises(DetectionError, match=r"the text has \d+ tokens, the model takes 48; shorten"):
        detect(model, tokenizer, "the " * 60)
    with pytest.raises(DetectionError, match="not UTF-8"):
        detect(model, tokenizer, "\udc80")
    assert "--threshold 1.5 is no probability" in complaint(capsys, str(folder), "a", "--threshold", "1.5")
    assert "is not a folder" in complaint(capsys, "/nowhere", "a")


def test_without_texts_each_line_of_standard_input_is_looked_through(folder, capsys, monkeypatch, tmp_path):
    lines = tmp_path / "lines.txt"
    monkeypatch.setattr(tool, "STANDARD_INPUT", lines)
    lines.write_text("die Banane\n\nเมืองหลวง 👩‍👧\n", encoding="utf-8")
    assert run_tool(tool.run, tool.parse_arguments([str(folder), "--json"])) == 0
    judged = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert judged == ["die Banane", "เมืองหลวง 👩‍👧"]
    lines.write_text("the class\n" + "the " * 60)
    assert "text 2 of 2: the text has" in complaint(capsys, str(folder))
    lines.write_text("\n \n")
    assert "standard input has no text; write one on each line" in complaint(capsys, str(folder))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "there is no text; write one behind the checkpoint" in complaint(capsys, str(folder))
