"""Where words begin in any script, and what is masked there."""

import io
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
from languages import LANGUAGES, texts_in
from small_stores import write

from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.data.loader import Batch, PretrainingData
from deberta_xl.data.masking import Masker, find_words
from deberta_xl.data.random_numbers import derive
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.words import (
    BEGINS,
    ENDS,
    JOINS,
    LONGEST_WORD,
    PART,
    WordLengths,
    begins_in_rows,
    word_flags,
    word_lengths,
)
from deberta_xl.settings.pretraining import DataSection

OTHERS_BEGIN = BEGINS | ENDS


@pytest.mark.parametrize(
    ("piece", "flags"),
    [
        *[("東京", OTHERS_BEGIN), ("する", OTHERS_BEGIN), ("データ", OTHERS_BEGIN), ("𠮷", OTHERS_BEGIN)],
        *[("ーション", OTHERS_BEGIN), ("々", OTHERS_BEGIN), ("ｶﾒﾗ", OTHERS_BEGIN), ("ｰ", OTHERS_BEGIN)],
        *[("、", OTHERS_BEGIN), ("」「", OTHERS_BEGIN), ("㍿", OTHERS_BEGIN), ("ㄅㄆ", OTHERS_BEGIN)],
        *[("ไทย", OTHERS_BEGIN), ("ລາວ", OTHERS_BEGIN), ("ខ្មែរ", OTHERS_BEGIN), ("မြန်မာ", OTHERS_BEGIN)],
        *[("བོད", OTHERS_BEGIN), ("་", OTHERS_BEGIN), ("ꦗꦮ", OTHERS_BEGIN), ("ꆈꌠ", OTHERS_BEGIN)],
        # What belongs to the character before it begins nothing.
        *[("ี่ยว", JOINS | ENDS), ("်း", JOINS | ENDS), ("\u3099", JOINS | ENDS), ("\ufe0f", JOINS), ("\u200dx", JOINS)],
        # A piece of two scripts: how it begins, and how it ends.
        *[("年2020", BEGINS), ("2020年", ENDS), ("▁2020年", OTHERS_BEGIN), ("GPUを", ENDS), ("は\ufe0f", OTHERS_BEGIN)],
        # Scripts with spaces, and what they share with the others.
        *[("▁the", BEGINS), ("ing", 0), ("ски", 0), ("كتاب", 0), ("हिन", 0), ("한국", 0), ("·", BEGINS), ("l·l", 0)],
        *[("2020", 0), ("😀", 0), ("€", 0), ("...", 0), ("", 0)],
    ],
)
def test_a_piece_of_a_script_without_spaces_begins_a_word_and_so_does_what_follows_it(piece, flags):
    assert word_flags(piece) == flags


def test_bytes_stay_with_their_character_and_only_east_asian_ones_begin_a_word():
    flags = [[word_flags(f"<0x{byte:02X}>", byte) for byte in text.encode()] for text in ("鷗", "é", "\n", "A", "𠮷")]
    assert flags == [[BEGINS, JOINS, JOINS], [0, JOINS], [BEGINS], [0], [0, JOINS, JOINS, JOINS]]


def test_a_latin_name_in_a_sentence_without_spaces_is_a_word_of_its_own():
    pieces = ["▁", "使用", "Py", "Torch", "2", "训练", "กิน", "้", "น", "<0xE9>", "<0xB7>", "a"]
    flags = [word_flags(piece, int(piece[1:-1], 16) if piece.startswith("<") else None) for piece in pieces]
    begins = begins_in_rows(np.array([flags], np.uint8))[0]
    words = [" ".join(part) for part in np.split(np.array(pieces), np.flatnonzero(begins)[1:])]
    assert words == ["▁", "使用", "Py Torch 2", "训练", "กิน ้", "น", "<0xE9> <0xB7> a"]


def test_a_tokenizer_with_byte_fallback_knows_its_bytes():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba abba 東京 東 京都"] * 20), model_writer=model, vocab_size=280, minloglevel=2,
        byte_fallback=True, hard_vocab_limit=False, character_coverage=1.0, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue())
    ids = tokenizer.encode("東鷗")
    assert [tokenizer.id_to_piece(i) for i in ids[-3:]] == ["<0xE9>", "<0xB7>", "<0x97>"]
    assert tokenizer.word_flags[ids[-4:]].tolist() == [OTHERS_BEGIN, BEGINS, JOINS, JOINS]
    assert not tokenizer.original_word_starts[ids[-3:]].any()


@pytest.mark.parametrize("length", [1, LONGEST_WORD, LONGEST_WORD + 1, 40, 300])
def test_words_longer_than_the_limit_are_cut_into_parts_and_others_stay_whole(length):
    shape = (2, length + 3)
    begins, maskable, segments = np.zeros(shape, bool), np.ones(shape, bool), np.ones(shape, int)
    begins[:, [0, length]] = True  # a word of `length` tokens, and one of three
    words = find_words(maskable, begins, segments, cuts_long_words=True)
    parts = [length] if length <= LONGEST_WORD else [PART] * (length // PART) + [length % PART] * (length % PART > 0)
    assert words.length_U.tolist() == [*parts, 3] * 2
    assert words.row_U.tolist() == [0] * (len(parts) + 1) + [1] * (len(parts) + 1)
    assert np.array_equal(words.word_T, np.repeat(np.arange(len(words.length_U)), words.length_U))
    assert find_words(maskable, begins, segments).length_U.tolist() == [length, 3] * 2


def test_the_lengths_of_words_are_counted_over_documents():
    flags = np.array([BEGINS, 0, 0, BEGINS, ENDS, 0, *[0] * 12, BEGINS], np.uint8)
    assert word_lengths(flags, np.array([2, 17])) == WordLengths(5, 19, 13, 13)
    nothing = word_lengths(flags[:0], np.zeros(0, np.int64))
    assert nothing == WordLengths()
    assert nothing.plus(WordLengths(2, 9, 5, 0)).plus(WordLengths(3, 19, 13, 13)) == WordLengths(5, 28, 13, 13)


class Masks(NamedTuple):
    """What was masked in a text."""

    share: float
    """Of the tokens."""
    labels_per_row: np.ndarray
    """Of the rows whose share is a token or more: all but the last."""
    span_of_label: np.ndarray
    """Tokens of the run of labelled tokens that each of them stands in."""
    unknown: int
    """[UNK]s in the text."""


def masks_of(data: PretrainingData, epochs: int) -> Masks:
    """Masks of all rows in some epochs."""
    rows = data.num_rows
    batch = Batch(*map(np.concatenate, zip(*(data.batch(epoch * rows, rows) for epoch in range(epochs)), strict=True)))
    is_label = batch.labels > 0
    edges = np.diff(np.pad(is_label.astype(int), ((0, 0), (1, 1))), axis=1)
    spans = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    unknown = np.count_nonzero(batch.input_ids[:rows] == data.tokenizer.unk_id)
    num_tokens = np.count_nonzero(batch.segments)
    labels_per_row = is_label.sum(axis=1)[np.count_nonzero(batch.segments, axis=1) * 0.15 >= 1]
    return Masks(is_label.sum() / num_tokens, labels_per_row, np.repeat(spans, spans), unknown)


def data_of(folder, texts: list[str], vocab_size: int, **section) -> PretrainingData:
    """The texts as rows of 128 tokens, with a tokenizer of their own."""
    if not (folder / "tokenizer").exists():
        train_tokenizer(texts, vocab_size, folder / "tokenizer")
        tokenizer = Tokenizer.load(folder / "tokenizer")
        write(folder / "data", [tokenizer.encode(text) for text in texts], tokenizer=tokenizer)
    return PretrainingData(
        TokenStore(folder / "data"), Tokenizer.load(folder / "tokenizer"), DataSection(**section), 128, seed=1
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_script_is_masked_in_short_spans_and_in_the_share_asked_for(language, tmp_path):
    texts = texts_in(language)
    data = data_of(tmp_path, texts, 60 if language == "DNA" else 160)
    masks = masks_of(data, epochs=8000 // data.num_rows)
    median, high, longest = (int(np.percentile(masks.span_of_label, q)) for q in (50, 90, 100))
    labels = masks.labels_per_row
    print(
        f"{language}: share {masks.share:.4f}; labels per row {labels.mean():.1f} ({labels.min()} to {labels.max()}); "
        f"masked spans: median {median}, 90 % {high}, longest {longest} tokens; unknown characters {masks.unknown}"
    )
    # A row's labels vary by about 2 around 19.2: in 8,000 rows the share does by 0.1 %.
    assert masks.share == pytest.approx(0.15, rel=0.005)
    assert labels.min() >= 1
    assert median <= 6
    assert high <= 3 * PART + 3
    assert longest <= 3 * LONGEST_WORD + 3 * PART
    assert masks.unknown == 0


def test_the_original_style_still_takes_clauses_for_words(tmp_path):
    spans = {}
    for style in ("unbiased", "original"):
        spans[style] = masks_of(data_of(tmp_path, texts_in("Japanese"), 200, masking=style), epochs=3).span_of_label
    assert np.median(spans["unbiased"]) <= 3
    assert np.median(spans["original"]) >= 8


@pytest.mark.parametrize("length", [7, 9, 16, 40])
@pytest.mark.parametrize("longest", [1, 5, 30])
def test_every_row_whose_share_is_a_token_or_more_has_a_label(length, longest):
    """However long its words are."""
    rows = 400
    word_starts = np.zeros(100, bool)
    word_starts[4 : 4 + 90 // longest] = True
    special = np.zeros(100, bool)
    special[:4] = special[99:] = True
    masker = Masker(DataSection(), word_starts=word_starts, special=special, mask_id=99)
    input_ids = np.random.default_rng(length).integers(4, 99, (rows, length))
    _, labels = masker.mask(input_ids, np.ones_like(input_ids), derive(1, np.arange(rows)))
    assert np.all((labels > 0).sum(axis=1) >= 1)
