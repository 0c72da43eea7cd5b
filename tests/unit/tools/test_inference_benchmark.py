"""benchmarks/inference.py: every way classifies alike, and the table and its file tell what each took."""

from __future__ import annotations

import json

import pytest

from benchmarks import inference
from deberta_xl.kernels.registry import KERNELS


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of two small layers."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48,
             "max_position_embeddings": 48, "max_relative_positions": 48, "position_buckets": 16,
             "sequence_length": 48}  # fmt: skip
    monkeypatch.setattr(inference, "SIZES", [f"model.{name}={value}" for name, value in sizes.items()])
    monkeypatch.setattr(inference, "VOCABULARY", 100)
    monkeypatch.setattr(inference, "REACH", 48)


def test_all_ways_agree_and_are_measured_on_the_lengths_of_a_file(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("A text, or two.\n\n" + "word " * 60 + "\nOne\n", encoding="utf-8")
    given = ["--lengths", str(tmp_path / "texts.txt"), "--turns", "1", "--json", str(tmp_path / "figures.json")]
    assert inference.run(inference.parse_arguments(given)) == 0
    assert "3 texts, 59 tokens, longest 48" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "figures.json").read_text())["cases"]
    # The fused kernels compute on GPUs.
    assert set(case["ways"]) == {
        "transformers",
        "transformers, sorted",
        *(f"ours, {name}" for name in KERNELS if name != "fused"),
    }
    for figures in case["ways"].values():
        assert figures["tokens_per_second"] == pytest.approx(figures["texts_per_second"] * 59 / 3)


def test_a_way_that_says_something_else_is_not_timed(capsys, monkeypatch):
    honest = inference.our_logits
    monkeypatch.setattr(inference, "our_logits", lambda *given, **more: (honest(*given, **more)[0] + 1,))
    assert inference.run(inference.parse_arguments(["--texts", "3", "--turns", "1"])) == 1
    assert "not measured: Disagreement: its results are off by" in capsys.readouterr().out
