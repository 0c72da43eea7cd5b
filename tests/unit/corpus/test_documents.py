"""Where a document of a text ends."""

import gzip
import io
import json

import numpy as np
import pytest

from deberta_xl.base.errors import CorpusError
from deberta_xl.corpus import documents as documents_module
from deberta_xl.corpus.documents import PART_CHARACTERS, blocks, parts
from deberta_xl.corpus.preprocessing import Preprocessing, preprocess
from deberta_xl.corpus.reading import iterate_documents
from deberta_xl.data.token_store import TokenStore


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("blank_lines", ["One.\nTwo.", "Three."]),
        ("lines", ["One.", "Two.", "Three."]),
        ("files", ["One.\nTwo.\n \nThree.\n"]),
        ("parts", ["One.\nTwo.\n \nThree."]),
    ],
)
def test_a_text_is_divided_as_it_is_asked_for(tmp_path, documents, expected):
    path = tmp_path / "a.txt"
    path.write_text("\ufeff\nOne.\nTwo.\n \nThree.\n\n", encoding="utf-8")
    found = list(iterate_documents([path], documents=documents))
    assert [text.rstrip("\n") for text in found] == [text.rstrip("\n") for text in expected]


@pytest.mark.parametrize("blank", ["\u3000", "\u3000 \u3000", "\u00a0", "\u2003\t", "\u200b", "\ufeff"])
def test_a_line_of_spaces_that_ascii_does_not_know_is_blank(tmp_path, blank):
    path = tmp_path / "a.txt"
    path.write_text(f"\u3000一。\n　二。\n{blank}\n三。\u3000\n{blank}", encoding="utf-8")
    assert list(iterate_documents([path])) == ["\u3000一。\n\u3000二。", "三。\u3000"]
    assert len(list(iterate_documents([path], documents="lines"))) == 3


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
@pytest.mark.parametrize("letter", ["A", "ä", "謎", "😀"])
def test_one_endless_line_is_cut_into_parts_and_nothing_is_lost(tmp_path, monkeypatch, name, letter):
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 1001)
    text = letter * 7000
    content = text if name != "a.jsonl" else json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    found = list(iterate_documents([tmp_path / name], documents="parts"))
    assert "".join(found) == text
    assert len(found) >= 4
    assert max(map(len, found)) <= PART_CHARACTERS


def test_parts_end_at_line_ends_and_spaces_where_there_are_any():
    for mark in (" ", "\n"):
        text = mark.join(["kalo"] * 3000)
        found = list(parts(text))
        assert mark.join(found) == text
        assert all(PART_CHARACTERS // 2 < len(part) <= PART_CHARACTERS for part in found[:-1])
    assert list(parts(" \n ")) == []


def test_a_broken_character_spoils_its_own_block_only(monkeypatch):
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 8)
    content = "ä€😀\n".encode() + b"\xff" * 9 + "é€\n€€€".encode()
    found = list(blocks(io.BytesIO(content)))
    assert b"".join(record.data for record in found) == content
    assert found[0].data.decode() == "ä€😀\n"
    assert found[-1].data.decode() == "€€€"
    assert found[-1].line == 3


def test_a_long_document_can_be_held_out_in_parts_by_any_number_of_workers(tmp_path, texts, tokenizer):
    (tmp_path / "novel.txt").write_text("\n".join(texts * 2))
    (tmp_path / "dna.txt").write_text("ACGT" * 3000)
    paths = [tmp_path / "dna.txt", tmp_path / "novel.txt"]
    for workers in (1, 2):
        plan = Preprocessing(
            tokenizer, tmp_path / f"t{workers}", tmp_path / f"v{workers}", 0.3, documents="parts", workers=workers
        )
        summary = preprocess(paths, plan)
        assert 0 < summary.held_out_documents < summary.documents
    one, two = (TokenStore(tmp_path / name) for name in ("t1", "t2"))
    assert len(one) == len(two)
    assert all(np.array_equal(one[n], two[n]) for n in range(len(one)))


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (
            "blank_lines",
            "0 of 1 document fell.*No blank line divides.*--documents lines makes each of its 300",
        ),
        ("files", "0 of 1 document fell.*--documents lines .*--documents parts cuts"),
        ("lines", "0 of 300 documents fell.*--documents parts .* another --valid_share"),
    ],
)
def test_an_empty_held_out_dataset_is_explained_by_what_was_seen(tmp_path, texts, tokenizer, documents, said):
    (tmp_path / "novel.txt").write_text("\n".join(texts))
    plan = Preprocessing(tokenizer, tmp_path / "t", tmp_path / "v", 1e-9, documents=documents)
    with pytest.raises(CorpusError, match=said):
        preprocess([tmp_path / "novel.txt"], plan)
