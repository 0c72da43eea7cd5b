import json
import os

import numpy as np
import pytest

from deberta_xl.base.errors import CorpusError, DataError
from deberta_xl.corpus import token_batches
from deberta_xl.corpus.documents import is_held_out
from deberta_xl.corpus.preprocessing import Preprocessing, preprocess
from deberta_xl.data.token_store import TokenStore


@pytest.fixture
def corpus(tmp_path, texts):
    """Two files with a few records that are bad, empty, or speak of special tokens."""
    lines = [json.dumps({"text": text}) for text in texts[:200]]
    lines[17] = "{broken"
    lines[50] = json.dumps({"text": "  "})
    lines[60] = json.dumps({"text": "kalo [MASK] mine [SEP] pura"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n\n".join(texts[200:]))
    return [tmp_path / "a.jsonl", tmp_path / "b.txt"]


def files_of(prefix) -> dict[str, bytes]:
    return {s: (prefix.parent / f"{prefix.name}{s}").read_bytes() for s in (".bin", ".idx", ".manifest.json")}


def test_documents_are_tokenised_in_order_and_everything_is_counted(corpus, tokenizer, texts, tmp_path):
    summary = preprocess(corpus, Preprocessing(tokenizer, tmp_path / "data"))
    store = TokenStore(tmp_path / "data")
    store.verify()
    expected = [text for number, text in enumerate(texts) if number not in (17, 50)]
    expected[59 - 1] = "kalo [MASK] mine [SEP] pura"
    assert len(store) == summary.documents == 298
    for number, text in enumerate(expected):
        assert np.array_equal(store[number], tokenizer.encode(text))
    assert (summary.bad_records, summary.empty_documents, summary.literal_specials) == (1, 1, 2)
    assert summary.tokens == store.num_tokens
    assert summary.unknown_tokens == sum(int((store[i] == tokenizer.unk_id).sum()) for i in range(len(store))) > 0
    assert summary.unknown_characters.keys() >= {"[", "]"}
    assert summary.unknown_characters["]"] == 2
    assert summary.reported[0].startswith(f"{corpus[0]}:18: invalid JSON")
    assert [entry["name"] for entry in store.manifest["inputs"]] == ["a.jsonl", "b.txt"]
    assert store.manifest["inputs"][0]["size"] == corpus[0].stat().st_size


def test_the_output_is_the_same_for_any_number_of_workers(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_batches, "BATCH_RECORDS", 7)
    summaries = []
    for workers in (1, 3):
        outputs = tmp_path / f"data{workers}", tmp_path / f"valid{workers}"
        summaries.append(
            preprocess(
                corpus, Preprocessing(tokenizer, outputs[0], workers=workers, valid_output=outputs[1], valid_share=0.2)
            )
        )
    assert summaries[0] == summaries[1]
    assert files_of(tmp_path / "data1") == files_of(tmp_path / "data3")
    assert files_of(tmp_path / "valid1") == files_of(tmp_path / "valid3")


def test_a_share_of_the_documents_is_held_out_by_their_text(corpus, tokenizer, texts, tmp_path):
    summary = preprocess(corpus, Preprocessing(tokenizer, tmp_path / "t", valid_output=tmp_path / "v", valid_share=0.2))
    train, valid = (TokenStore(tmp_path / name) for name in "tv")
    assert len(train) + len(valid) == 298
    assert len(valid) == summary.held_out_documents
    assert valid.num_tokens == summary.held_out_tokens
    held_out = [text for n, text in enumerate(texts) if n not in (17, 50, 60) and is_held_out(text, 0.2)]
    assert {tuple(tokenizer.encode(t)) for t in held_out} <= {tuple(valid[i]) for i in range(len(valid))}
    # A binomial share of 298 documents: 20 % ± 5 standard errors.
    assert abs(len(valid) / 298 - 0.2) < 5 * np.sqrt(0.16 / 298)


def test_strict_stops_at_the_first_bad_record_and_leaves_nothing(corpus, tokenizer, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CorpusError, match=r"a\.jsonl:18: invalid JSON"):
        preprocess(corpus, Preprocessing(tokenizer, tmp_path / "data", strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_input_without_text_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "b.txt").write_text("\n\n \n")
    with pytest.raises(CorpusError, match=r"no document \(1 bad record\): .*a\.jsonl:1: no key 'text'"):
        preprocess([tmp_path / "a.jsonl", tmp_path / "b.txt"], Preprocessing(tokenizer, tmp_path / "data"))
    (tmp_path / "b.txt").write_text("kalo mine")
    with pytest.raises(CorpusError, match="leaves a dataset empty"):
        preprocess(
            [tmp_path / "b.txt"],
            Preprocessing(tokenizer, tmp_path / "data", valid_output=tmp_path / "valid", valid_share=0.5),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.txt"]


def test_a_damaged_file_in_the_middle_of_the_work_leaves_an_older_dataset_alone(corpus, tokenizer, tmp_path):
    preprocess(corpus, Preprocessing(tokenizer, tmp_path / "data"))
    before = files_of(tmp_path / "data")
    (tmp_path / "c.txt.gz").write_bytes(b"\x1f\x8b\x08broken")
    with pytest.raises(CorpusError, match=r"c\.txt\.gz is damaged"):
        preprocess(
            [*corpus, tmp_path / "c.txt.gz"], Preprocessing(tokenizer, tmp_path / "data", overwrite=True, workers=2)
        )
    assert files_of(tmp_path / "data") == before


def die(batch):
    """What a killed worker does with its batch."""
    os._exit(9)


def test_a_killed_worker_is_reported_and_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_batches, "work_in_worker", die)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match="a worker process was killed"):
        preprocess(corpus, Preprocessing(tokenizer, tmp_path / "data", workers=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_progress_adds_up_to_the_size_of_the_input(corpus, tokenizer, tmp_path):
    done = []
    preprocess(
        corpus, Preprocessing(tokenizer, tmp_path / "data", advance=lambda num_bytes, note: done.append(num_bytes))
    )
    assert sum(done) == sum(path.stat().st_size for path in corpus)
