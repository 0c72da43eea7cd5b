import errno
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from deberta_xl.base.errors import CorpusError, TokenizerError
from deberta_xl.corpus.tokenizer_training import (
    SCORE_STEP,
    largest_vocab_size,
    reserved_ids,
    train_tokenizer,
    training_lines,
)
from deberta_xl.data.tokenizer import Tokenizer, begins_word


def test_ids_follow_debertas_conventions(tokenizer):
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 208
    assert tokenizer.num_pieces == tokenizer.mask_id == 200
    assert tokenizer.id_to_piece(200) == "[MASK]"
    assert tokenizer.piece_to_id("[MASK]") == 200
    assert tokenizer.id_to_piece(207) == "[SPARE 7]"


def test_encoding_is_sentencepieces_alone_or_in_a_batch(tokenizer, texts):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.spm_model)
    expected = [processor.encode(text) for text in texts[:20]]
    batch = tokenizer.encode_batch(texts[:20])
    assert [ids.tolist() for ids in batch] == expected
    assert [tokenizer.encode(text).tolist() for text in texts[:20]] == expected
    assert all(ids.dtype == np.int32 for ids in batch)
    assert tokenizer.encode("").tolist() == []


def test_decoding_gives_the_text_back_and_shows_masks(tokenizer, texts):
    ids = tokenizer.encode(texts[0]).tolist()
    assert tokenizer.decode([1, *ids, 2, 0, 0]) == texts[0]
    words = [tokenizer.encode(word).tolist() for word in ("kalo", "mine", "pura")]
    assert tokenizer.decode([1, *words[0], 200, *words[2], 2]) == "kalo [MASK] pura"
    assert tokenizer.decode([200, 200, 207]) == "[MASK] [MASK]"


def test_literal_specials_in_text_are_ordinary_text(tokenizer):
    for piece in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
        ids = tokenizer.encode(f"kalo {piece} mine")
        assert not set(ids.tolist()) & {0, 1, 2, tokenizer.mask_id}


def test_word_starts_and_specials_are_as_the_original_has_them(tokenizer):
    for token in range(4, tokenizer.num_pieces):
        piece = tokenizer.id_to_piece(token)
        is_lone_punctuation = len(piece) == 1 and piece in ".!?"
        assert tokenizer.word_starts[token] == (piece.startswith("▁") or is_lone_punctuation)
        assert not tokenizer.special[token]
    others = [0, 1, 2, 3, *range(200, 208)]
    assert tokenizer.word_starts[others].all()
    assert tokenizer.special[others].all()
    assert len(tokenizer.word_starts) == len(tokenizer.special) == 208


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        *[("▁the", True), ("▁", True), (".", True), ("$", True), ("—", True), ("…", True)],
        *[("\u00a0", True), ("\u200b", True)],
        *[("ing", False), ("s", False), ("é", False), ("5", False), ("..", False), ("中", False), ("€", False)],
    ],
)
def test_a_piece_begins_a_word_by_the_rule_of_the_first_release(piece, expected):
    assert begins_word(piece) == expected


def test_a_saved_tokenizer_loads_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "copy")
    loaded = Tokenizer.load(tmp_path / "deep" / "copy")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == 208
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["copy"]


def test_a_bare_released_model_loads_with_or_without_spare_ids(tokenizer, tmp_path):
    (tmp_path / "spm.model").write_bytes(tokenizer.spm_model)
    assert Tokenizer.load(tmp_path).vocab_size == 201
    padded = Tokenizer.load(tmp_path, vocab_size=300)
    assert padded.vocab_size == 300
    assert padded.special[201:].all()
    assert padded.fingerprint != tokenizer.fingerprint


def test_a_folder_of_another_tokenizer_is_not_sent_to_make_a_new_one(tmp_path):
    for name, words in (("tokenizer.json", r"copy the spm\.model of the release"), ("vocab.json", "byte-level BPE")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(TokenizerError, match=words):
            Tokenizer.load(tmp_path)


def test_a_damaged_or_foreign_tokenizer_is_refused(tokenizer, tokenizer_folder, tmp_path):
    with pytest.raises(TokenizerError, match=r"holds no spm\.model"):
        Tokenizer.load(tmp_path / "nowhere")
    model, settings = tmp_path / "spm.model", tmp_path / "tokenizer_settings.json"
    good = (tokenizer_folder / "tokenizer_settings.json").read_text()
    settings.write_text(good)
    for damage in (b"", b"not a model", tokenizer.spm_model[:-1], tokenizer.spm_model + b"x"):
        model.write_bytes(damage)
        with pytest.raises(TokenizerError, match="damaged"):
            Tokenizer.load(tmp_path)
    model.write_bytes(tokenizer.spm_model)
    for text in ("{", "[]", json.dumps({"version": 9}), json.dumps({"version": 1})):
        settings.write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_settings\.json"):
            Tokenizer.load(tmp_path)
    settings.unlink()
    model.write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="at least 201"):
        Tokenizer(tokenizer.spm_model, vocab_size=200)


def test_a_tokenizer_with_other_special_ids_is_refused(texts, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "spm"), vocab_size=120, minloglevel=2
    )
    with pytest.raises(TokenizerError, match="not a DeBERTa tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_same_text_gives_the_same_tokenizer(texts, tokenizer, tmp_path):
    again = train_tokenizer(texts, 208, tmp_path / "again")
    assert again.spm_model == tokenizer.spm_model
    sampled = [train_tokenizer(texts, 108, tmp_path / name, max_lines=150).spm_model for name in "ab"]
    assert sampled[0] == sampled[1]


def test_an_unfillable_vocabulary_is_refused_with_the_largest_that_works(texts, tmp_path):
    with pytest.raises(TokenizerError, match="choose at most") as caught:
        train_tokenizer(texts, 50_000, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())
    largest = int(str(caught.value).split("choose at most ")[1].split(",")[0])
    assert train_tokenizer(texts, largest, tmp_path / "tokenizer").vocab_size == largest


def test_a_vocabulary_below_the_alphabet_or_without_text_is_refused(texts, tmp_path):
    for vocab_size in (5, 20):
        with pytest.raises(TokenizerError, match="choose"):
            train_tokenizer(texts, vocab_size, tmp_path / "tokenizer")
    with pytest.raises(TokenizerError, match="max_lines=100"):
        train_tokenizer(texts, 208, tmp_path / "tokenizer", max_lines=100)
    with pytest.raises(TokenizerError, match="no line to learn from"):
        train_tokenizer(["", "  \n "], 208, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_an_existing_tokenizer_is_replaced_only_on_request(texts, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "spm.model").write_text("old")
    with pytest.raises(TokenizerError, match="--overwrite"):
        train_tokenizer(texts, 108, folder)
    assert (folder / "spm.model").read_text() == "old"
    train_tokenizer(texts, 108, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["spm.model", "tokenizer_settings.json"]
    Tokenizer.load(folder)


def test_a_folder_with_other_files_is_never_overwritten(texts, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(TokenizerError, match="precious"):
        train_tokenizer(texts, 108, tmp_path, overwrite=True)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("failure", [CorpusError("a.gz is damaged"), KeyboardInterrupt()])
def test_what_reading_the_text_raises_is_not_taken_for_sentencepieces_complaint(texts, tmp_path, failure):
    def broken():
        yield from texts[:5]
        raise failure

    with pytest.raises(type(failure)) as caught:
        train_tokenizer(broken(), 108, tmp_path / "tokenizer")
    assert caught.value is failure
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_part_of_a_tokenizer(tokenizer, tmp_path, monkeypatch):
    def refuse(self, *_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_the_released_size_has_the_released_number_of_pieces():
    assert 128_100 - reserved_ids(128_100) == 128_000
    assert 8_000 - reserved_ids(8_000) == 7_992
    for pieces in (500, 9_899, 9_900, 9_950, 50_000):
        largest = largest_vocab_size(pieces)
        assert largest - reserved_ids(largest) <= pieces < largest + 1 - reserved_ids(largest + 1) or largest == 9_999


def test_long_lines_are_cut_for_training_and_nothing_is_lost():
    text = "kalo " * 1000 + "\n\n" + "x" * 2500
    lines = list(training_lines([text]))
    assert max(map(len, lines)) <= 1000
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_scores_add_up_exactly_so_that_every_library_breaks_ties_alike(tokenizer):
    scores = [piece.score for piece in ModelProto.FromString(tokenizer.spm_model).pieces]
    assert all(score % SCORE_STEP == 0 for score in scores)
    assert min(scores) < -5
