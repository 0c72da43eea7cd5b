"""The quickstart on the user's own text in several scripts and forms, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from invented_text import sample

from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.settings.pretraining import DataSection

ROOT = Path(__file__).parents[2]
TINY = [
    "model.vocab_size=none", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "train.steps=4",
    "model.intermediate_size=64", "model.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=4",
    "schedule.warmup_steps=2",
]  # fmt: skip
LENGTH = 64


def measures(folder: Path) -> dict[str, float]:
    """Masked tokens of a row, the longest run of them, and the share of unknown tokens."""
    tokenizer, store = Tokenizer.load(folder / "tokenizer"), TokenStore(folder / "data/train")
    batch = PretrainingData(store, tokenizer, DataSection(), LENGTH, 1).batch(0, 64)
    is_masked = batch.labels != 0
    edges = np.diff(np.pad(is_masked, ((0, 0), (1, 1))).astype(int), axis=1)
    runs = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    return {
        "median masked span": float(np.median(runs)),
        "longest masked span": float(np.max(runs)),
        "share masked": float(is_masked.sum() / np.count_nonzero(batch.segments)),
        "fewest labels of a row": int(is_masked.sum(axis=1).min()),
        "unknown": int(np.count_nonzero(batch.input_ids == tokenizer.unk_id)),
    }


@pytest.mark.full
@pytest.mark.parametrize(
    ("language", "form"),
    [("en", "blank lines"), ("ja", "novel"), ("de", "a line each"), ("ar", "one line"), ("dna", "one line")],
)
def test_the_quickstart_takes_text_of_any_script_and_form(tmp_path, language, form):
    (tmp_path / "own.txt").write_text(sample(language, form), encoding="utf-8")
    work = ["--folder", str(tmp_path / "work"), "--corpus", str(tmp_path / "own.txt")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "quickstart.py"), *work, "--", *TINY],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=500,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    found = measures(tmp_path / "work")
    print(f"\n{language}, {form}: {found}")
    print(result.stdout.partition("== 6.")[2].partition("== Done")[0])
    assert "in sentences that were held out; hidden: " in result.stdout
    assert result.stdout.count("([MASK] 1 of 1)") >= 1
    assert found["unknown"] == 0
    assert found["median masked span"] <= 4
    assert found["longest masked span"] <= 24
    assert found["share masked"] == pytest.approx(0.15, abs=0.01)
    assert found["fewest labels of a row"] >= 1
