"""The command-line tools of the data path, started as a user starts them."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from deberta_xl.base.command_line import run_tool
from deberta_xl.base import progress as progress_module
from deberta_xl.corpus.python_corpus import DOCUMENT_LENGTH, cut, docstrings, python_corpus
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from tools import train_tokenizer

REPOSITORY = Path(__file__).parents[3]


def run(tool: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """Start a tool in some folder."""
    return subprocess.run(
        [sys.executable, REPOSITORY / "tools" / f"{tool}.py", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_text_becomes_a_tokenizer_and_a_dataset(tmp_path, texts):
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps({"body": text}) for text in texts[:50]] + ["{"]))
    inputs = "--input", "*.txt", "*.jsonl", "--json_key", "body"
    trained = run("train_tokenizer", *inputs, "--vocab_size", 208, "--output", "tokenizer", folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "208 ids = 200 pieces + [MASK] (id 200) + 7 spare ids" in trained.stdout
    assert "different ones, none of them lost (--character_coverage 1, the default up to 3,000" in trained.stdout
    assert "b.jsonl:51: invalid JSON" in trained.stderr
    made = run(
        "preprocess", *inputs, "--tokenizer", "tokenizer", "--output", "data/train", "--valid-output", "data/valid",
        "--valid_share", 0.1, "--workers", 1, folder=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    train, valid = TokenStore(tmp_path / "data/train"), TokenStore(tmp_path / "data/valid")
    assert len(train) + len(valid) == 350
    assert f"data/train: {len(train)} documents, {train.num_tokens:,} tokens" in made.stdout
    assert "skipped: 1 bad record, 0 documents" in made.stdout
    assert "b.jsonl:51: invalid JSON" in made.stderr
    assert sorted(p.name for p in (tmp_path / "data").iterdir() if p.name.startswith("train")) == [
        "train.bin", "train.idx", "train.manifest.json", "train.tokenizer"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("train_tokenizer", "--input none.txt --vocab_size 500 --output tokenizer", "none.txt: no such file"),
        ("train_tokenizer", "--input few.txt --vocab_size 500 --output tokenizer", "choose at most"),
        ("train_tokenizer", "--input few.txt --vocab_size 500 --output few.txt", "few.txt is a file"),
        ("train_tokenizer", "--input old.jsonl --vocab_size 500 --output tokenizer", "--json_key"),
        ("preprocess", "--input few.txt --tokenizer none --output data", "none holds no spm.model"),
        ("preprocess", "--input few.txt --tokenizer . --output d --workers 0", "--workers 0"),
        (
            "preprocess",
            "--input few.txt --tokenizer . --output d --valid_output v --valid_share 1",
            "--valid_share 1.0",
        ),
        ("preprocess", "--input few.txt --tokenizer . --output d --valid_output ./d", "two prefixes"),
        ("preprocess", "--input few.txt --tokenizer . --output data/", "not the prefix of a dataset"),
        ("extract_corpus", "--output few.txt", "must end with .jsonl"),
        ("extract_corpus", "--output old.jsonl", "old.jsonl exists"),
        ("extract_corpus", "--output folder.jsonl --overwrite", "folder.jsonl is a folder"),
    ],
)
def test_a_users_error_is_one_line_and_changes_nothing(tmp_path, tool, arguments, message):
    (tmp_path / "few.txt").write_text("only a few words")
    (tmp_path / "old.jsonl").write_text("{}")
    (tmp_path / "folder.jsonl").mkdir()
    result = run(tool, *arguments.split(), folder=tmp_path)
    assert result.returncode == 2
    last_line = result.stderr.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.txt", "folder.jsonl", "old.jsonl"]


def test_bad_records_are_shown_when_training_a_tokenizer_fails_for_their_sake(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\nnot json\n')
    result = run("train_tokenizer", "--input", "bad.jsonl", "--vocab_size", 500, "--output", "t", folder=tmp_path)
    assert result.returncode == 2
    assert "bad.jsonl:1: no key 'text' (keys: 'body')" in result.stderr
    assert "bad.jsonl:2: invalid JSON" in result.stderr


def test_lost_characters_are_listed_with_what_keeps_them(tmp_path, texts, capsys):
    (tmp_path / "a.txt").write_text("\n".join([*texts, "é 7 \u200b", "Щé " * 3, *"bcwyz" * 3]))
    (tmp_path / "symbols.txt").write_text("\ufeff<url>\n\n@@\n", encoding="utf-8")
    command = ["--input", str(tmp_path / "a.txt"), "--vocab_size", "9000", "--allow_smaller", "--overwrite"]
    command += ["--output", str(tmp_path / "t"), "--user_symbols", "<user>"]
    command += ["--user_symbols_file", str(tmp_path / "symbols.txt"), "--character_coverage", "0.999"]
    train_tokenizer.train(train_tokenizer.parse_arguments(command))
    said = capsys.readouterr().out
    assert "--vocab_size 9000 is more than this text can fill; " in said
    assert "are lost: they become [UNK] (--character_coverage 0.999)\n" in said
    assert re.search(r"\n  .*é ×4.*, Щ ×3", said)
    assert "to keep them: --character_coverage 1 (" in said
    assert "or --byte_fallback (256 pieces" in said
    pieces = Tokenizer.load(tmp_path / "t")
    assert [pieces.id_to_piece(n) for n in range(4, 7)] == ["<user>", "<url>", "@@"]


def test_a_vocabulary_of_hardly_more_than_characters_is_warned_about(tmp_path, capsys):
    characters = [chr(0x4E00 + n) for n in range(150)]
    (tmp_path / "a.txt").write_text("\n".join(["".join(characters[n:] + characters[:n]) for n in range(150)]))
    command = ["--input", str(tmp_path / "a.txt"), "--vocab_size", "180", "--output", str(tmp_path / "t")]
    train_tokenizer.train(train_tokenizer.parse_arguments(command))
    assert "warning: 15" in (warned := capsys.readouterr().err)
    assert "pieces are single characters or bytes" in warned


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room and start again"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (OSError("only words"), "only words"),
    ],
)
def test_what_the_system_refuses_is_one_line_without_an_error_number(error, text, capsys):
    def work(_arguments):
        raise error

    assert run_tool(work, None) == 2
    assert capsys.readouterr().err == f"error: {text}\n"


@pytest.mark.parametrize("tool", ["train_tokenizer", "preprocess", "extract_corpus"])
def test_help_shows_an_example(tmp_path, tool):
    result = run(tool, "--help", folder=tmp_path)
    assert result.returncode == 0
    assert f"python tools/{tool}.py --" in result.stdout


def test_the_python_corpus_is_english_without_repetitions(tmp_path, monkeypatch):
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "logging/handlers.py", "test/copy.py", "copy_of_argparse.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(library / name if (library / name).exists() else library / "argparse.py", tmp_path / name)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    documents = list(python_corpus())
    texts = [document["text"] for document in documents]
    assert len(set(texts)) == len(texts)
    assert sum(text.count(" the ") for text in texts) > 3_000
    files = {document["source"].split("#")[0] for document in documents}
    assert {file for file in files if not file.startswith("pydoc_data.topics/")} == {
        "argparse.py",
        "logging/handlers.py",
    }
    assert len(files) > 50


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    with progress_module.progress("reading", 200) as advance:
        advance(50, "some note")
        advance(100)
    assert capsys.readouterr().err == "reading: 25% some note\nreading: 75%\n"


def test_docstrings_come_in_the_order_of_the_source_from_every_depth():
    source = b'''"""Module."""
class Outer:
    """Outer."""
    def method(self):
        """Method."""
        if True:
            def inner():
                """Inner."""
    x = 1
async def last():
    """Last."""
def silent(): pass
'''
    assert docstrings(source) == ["Module.", "Outer.", "Method.", "Inner.", "Last."]
    assert docstrings(b"not python (") == []


def test_long_texts_are_cut_between_paragraphs():
    text = "\n\n".join(f"paragraph {n} " + "x" * 700 for n in range(30))
    parts = list(cut(text))
    assert "\n\n".join(parts) == text
    assert all(DOCUMENT_LENGTH <= len(part) < DOCUMENT_LENGTH + 800 for part in parts[:-1])
