"""The quickstart's folder belongs to what it was made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deberta_xl.base.errors import UserError
from tools import quickstart
from tools.quickstart import claim


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text of 5 bytes."""
    (tmp_path / "own.txt").write_text("words")
    return str(tmp_path / "own.txt")


def test_the_same_text_and_vocabulary_continue(tmp_path, text):
    for _ in range(2):
        claim(tmp_path / "work", [text], 600)
        (tmp_path / "work" / "tokenizer").mkdir(exist_ok=True)


def test_before_anything_is_made_of_it_another_text_may_be_taken(tmp_path, text):
    claim(tmp_path / "work", None, 600)
    claim(tmp_path / "work", [text], 700)
    (tmp_path / "work" / "tokenizer").mkdir()
    claim(tmp_path / "work", [text], 700)


def test_another_text_or_vocabulary_is_refused_with_what_there_is_and_the_way_out(tmp_path, text):
    claim(tmp_path / "work", [text], 600)
    (tmp_path / "work" / "tokenizer").mkdir()
    for corpus, vocab_size, asked in (
        (None, 600, "the English that comes with Python with a vocabulary of 600"),
        ([text], 700, r"own.txt \(5 bytes\) with a vocabulary of 700"),
    ):
        with pytest.raises(UserError, match=rf"own.txt \(5 bytes\) with a vocabulary of 600; asked for is .*{asked}"):
            claim(tmp_path / "work", corpus, vocab_size)
    Path(text).write_text("more words")
    with pytest.raises(UserError, match=r"own.txt \(10 bytes\).*--folder OTHER .*rm -r .*work"):
        claim(tmp_path / "work", [text], 600)


def test_few_steps_have_a_short_warm_up():
    for overrides, expected in (([], 50), (["train.steps=40"], 4), (["train.steps=9", "train.steps=2000"], 50)):
        assert quickstart.warmup(overrides) == f"schedule.warmup_steps={expected}"


def test_a_folder_without_a_note_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "work" / "tokenizer").mkdir(parents=True)
    Path(text).write_text("\n\n".join(f"Document {n} of many that are long enough." for n in range(600)))
    command = [sys.executable, quickstart.__file__, "--folder", str(tmp_path / "work")]
    result = subprocess.run([*command, "--corpus", text], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "does not say what it was made from" in result.stderr
    assert result.stderr.count("\n") == 1
