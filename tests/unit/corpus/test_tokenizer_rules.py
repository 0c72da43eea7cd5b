"""What a tokenizer keeps of a text, what becomes of the rest, and that everything downstream takes such tokenizers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from deberta_xl.base.errors import TokenizerError
from deberta_xl.conversion.tokenizer_export import huggingface_tokenizer
from deberta_xl.corpus import piece_trainer
from deberta_xl.corpus.characters import CharacterCounts, listed
from deberta_xl.corpus.piece_training import PieceTraining, TrainingProgress
from deberta_xl.corpus.tokenizer_rules import NORMALIZATIONS, TokenizerRules
from deberta_xl.corpus.tokenizer_training import SCORE_STEP, TrainedTokenizer, train_tokenizer
from deberta_xl.data.masking import find_words
from deberta_xl.data.tokenizer import Tokenizer

RARE = "Щ§é”7\u200d"
SYMBOLS = ("<url>", "a,b", "@@")


def trained(texts, folder: Path, vocab_size: int = 308, **rules):
    """A tokenizer by some rules, in a new folder."""
    name = f"t{len(list(folder.iterdir()))}"
    chosen = TokenizerRules(**rules)
    counts = CharacterCounts(composes=chosen.composes)
    tokenizer = train_tokenizer(texts, vocab_size, folder / name, rules=chosen, allow_smaller=True, counts=counts)
    return TrainedTokenizer.of(tokenizer, chosen, counts)


@pytest.fixture(scope="module")
def mixed(texts):
    """Text with capitals, digits, a rare character of each kind, tabs and line ends."""
    rng = random.Random(0)
    lines = [f"{text}\t{rng.randrange(10**4)} @@ <url>\nÉcole a,b" for text in texts[:150]]
    return [*lines, *RARE]


def test_a_text_in_an_alphabet_loses_no_character(mixed, tmp_path):
    result = trained(mixed, tmp_path)
    assert result.coverage == 1
    assert result.lost == {}
    assert result.characters["Щ"] == 1
    for character in RARE:
        assert result.tokenizer.unk_id not in result.tokenizer.encode(character)


def test_of_thousands_of_characters_the_rarest_are_left_out_and_counted(texts, tmp_path):
    common, rare = "".join(map(chr, range(0x4E00, 0x4E00 + 500))), [chr(0x5500 + n) for n in range(2600)]
    result = trained([*[common] * 1200, "".join(rare), rare[7] * 9], tmp_path, 3008)
    assert result.coverage == 0.9995
    assert len(result.characters) == 3100
    assert 200 < len(result.lost) < 400
    assert set(result.lost.values()) == {1}
    assert rare[7] not in result.lost
    assert all(result.tokenizer.unk_id in result.tokenizer.encode(character) for character in list(result.lost)[:50])


def test_a_chosen_coverage_is_kept_to(mixed, tmp_path):
    result = trained(mixed, tmp_path, character_coverage=0.99)
    assert {"Щ", "§", "”"} <= result.lost.keys()
    assert list(result.lost.items()) == [(c, n) for c, n in result.characters.items() if c in result.lost]
    assert list(result.lost.values()) == sorted(result.lost.values(), reverse=True)


def test_with_byte_fallback_nothing_is_unknown_and_bytes_continue_words(mixed, tmp_path):
    result = trained(mixed, tmp_path, 508, byte_fallback=True, character_coverage=0.99)
    tokenizer = result.tokenizer
    assert result.lost == {}
    text = "kalo 😀x Щ, 謎。"
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text
    places = tokenizer.encode_with_places(text)[1]
    assert "😀" in [text[begin:end] for begin, end in places]
    bytes_of = np.array([tokenizer.processor.is_byte(int(token)) for token in ids])
    assert bytes_of.sum() >= 4
    begins = [tokenizer.id_to_piece(int(token)) for token in ids[bytes_of] if tokenizer.word_starts[token]]
    assert begins == ["<0xE8>", "<0xE3>"]  # 謎 and 。, of a script without spaces; 😀 and Щ continue what they follow
    assert not tokenizer.special[ids].any()


@pytest.mark.parametrize(
    "normalization",
    [pytest.param(n, marks=pytest.mark.full if n == "nfkc_cf" else ()) for n in NORMALIZATIONS],
)
def test_no_normalization_leaves_line_ends_unknown(mixed, tmp_path, normalization):
    tokenizer = trained(mixed, tmp_path, normalization=normalization).tokenizer
    ids = tokenizer.encode("kalo\nmine\tpura\r\n\nsi")
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids).split() == ["kalo", "mine", "pura", "si"]
    lowers = normalization.endswith("_cf")
    assert tokenizer.decode(tokenizer.encode("École")) == ("école" if lowers else "École")
    full_width = tokenizer.decode(tokenizer.encode("ｋａｌｏ"))
    assert ("kalo" in full_width) == (normalization != "identity")


def test_user_symbols_are_one_piece_and_words_are_masked_with_them(mixed, tmp_path):
    tokenizer = trained(mixed, tmp_path, user_symbols=SYMBOLS).tokenizer
    for symbol in SYMBOLS:
        text = f"kalo{symbol}mine {symbol} pura"
        assert [tokenizer.id_to_piece(token) for token in tokenizer.encode(text)].count(symbol) == 2
        assert tokenizer.decode(tokenizer.encode(text)) == text
    row = tokenizer.encode("kalo <url> mine")[None]
    words = find_words(np.ones_like(row, bool), tokenizer.word_starts[row], np.ones_like(row))
    assert words.count_B.tolist() == [3]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"user_symbols": ("[MASK]",)}, "tokenizer's own"),
        ({"user_symbols": ("<0x41>",)}, "tokenizer's own"),
        ({"user_symbols": ("a b",)}, "holds a space"),
        ({"user_symbols": ("",)}, "empty"),
        ({"user_symbols": ("x", "y", "x")}, "'x' is given 2 times"),
        ({"user_symbols": ("<URL>",), "normalization": "nmt_nfkc_cf"}, "reads '<url>'"),
        ({"user_symbols": ("\ud800",)}, "not UTF-8"),
        ({"character_coverage": 0.5}, r"0\.98 … 1"),
        ({"character_coverage": float("nan")}, r"0\.98 … 1"),
        ({"character_coverage": 99.95}, r"0\.98 … 1"),
        ({"normalization": "nfc"}, "choose one of nmt_nfkc"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(TokenizerError, match=message):
        TokenizerRules(**rules)


def test_split_digits_are_pieces_of_their_own(mixed, tmp_path):
    tokenizer = trained(mixed, tmp_path, split_digits=True).tokenizer
    assert [tokenizer.id_to_piece(token).strip("▁") for token in tokenizer.encode("1234")][-4:] == list("1234")
    assert not any(tokenizer.id_to_piece(n).strip("▁").isdigit() and len(tokenizer.id_to_piece(n)) > 1
                   for n in range(tokenizer.num_pieces))  # fmt: skip


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"character_coverage": 0.99, "byte_fallback": True, "split_digits": True},
        {"normalization": "identity", "byte_fallback": True},
        {"normalization": "nmt_nfkc_cf", "user_symbols": SYMBOLS, "split_digits": True},
    ],
)
def test_an_exported_tokenizer_gives_the_same_ids_whatever_the_rules(mixed, texts, tmp_path, rules):
    tokenizer = trained(mixed, tmp_path, 508, **rules).tokenizer
    scores = [piece.score for piece in ModelProto.FromString(tokenizer.spm_model).pieces]
    assert all(score % SCORE_STEP == 0 for score in scores)
    loaded = Tokenizer.load(tmp_path / "t0")
    assert loaded.fingerprint == tokenizer.fingerprint
    exported = huggingface_tokenizer(loaded)
    rng = random.Random(1)
    parts = ["kalo", "Mine", " ", " ", "12", "3", "...", ".", "…", "😀", "Щ", "é", "ﬁ", "謎", "\n", "\t", *SYMBOLS]
    lines = [*mixed, *SYMBOLS, *("".join(rng.choices(parts, k=12)) for _ in range(300))]
    for line in lines:
        ids = loaded.encode(line).tolist()
        assert exported.encode(line, add_special_tokens=False).ids == ids, line
        assert loaded.encode_with_places(line)[0] == ids


def test_a_smaller_vocabulary_is_taken_on_request_only(texts, tmp_path):
    with pytest.raises(TokenizerError, match="choose at most") as caught:
        train_tokenizer(texts, 50_000, tmp_path / "tokenizer")
    largest = int(str(caught.value).split("choose at most ")[1].split(",")[0])
    smaller = train_tokenizer(texts, 50_000, tmp_path / "tokenizer", allow_smaller=True)
    assert smaller.vocab_size == largest


def test_characters_are_counted_as_normalisation_puts_them_together_and_shown_so_that_they_are_seen():
    for composes, expected in ((True, {"é": 2, "a": 1}), (False, {"e": 1, "\u0301": 1, "é": 1, "a": 1})):
        counts = CharacterCounts(composes=composes)
        assert list(counts.watch(["e\u0301 a", "é\n"])) == ["e\u0301 a", "é\n"]
        assert counts.found() == expected
    lost = {"é": 1234, "\u200b": 3, "\u0301": 2, "\x07": 1}
    assert listed(lost, 3) == "é ×1,234, U+200B (zero width space) ×3, U+0301 (combining acute accent) ×2 and 1 more"
    assert listed({"\x07": 1}, 3) == "U+0007 ×1"


# The process that trains.


def train_interrupted(training: PieceTraining) -> None:
    """Train until the alarm clock rings."""
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    training.train({}, lambda amount, note: None, 100)


def test_an_interrupt_ends_the_training_process_at_once(tmp_path, monkeypatch):
    deaf = tmp_path / "deaf.py"
    deaf.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n")
    monkeypatch.setattr(piece_trainer, "__file__", str(deaf))
    before, started = signal.signal(signal.SIGALRM, signal.default_int_handler), time.monotonic()
    try:
        with PieceTraining(max_lines=200, seed=1) as training, pytest.raises(KeyboardInterrupt):
            train_interrupted(training)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 3
    assert training.child.returncode == -signal.SIGKILL


def test_a_training_process_that_is_killed_is_named(texts):
    with PieceTraining(max_lines=200, seed=1) as training:
        training.child.kill()
        training.child.wait()
        with pytest.raises(TokenizerError, match=r"signal 9 \(out of memory\?\)"):
            training.read(texts * 20)


def test_a_killed_parent_leaves_no_training_process():
    code = (
        "import time; from deberta_xl.corpus.piece_training import PieceTraining\n"
        "training = PieceTraining(max_lines=200, seed=1); training.child.stdin.flush()\n"
        "print(training.child.pid, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_progress_follows_the_candidates_that_are_left():
    progress = TrainingProgress(8000)
    shares = []
    for line in (
        "trainer_interface.cc:466] Normalizing sentences...",
        "Extracting seed sentencepieces (libsais_omp, 8 threads)",
        "Initialized 100000 seed pieces",
        "Tokenizing input sentences with whitespace: 5352",
        "Using 18101 sentences for EM training",
        "EM sub_iter=0 size=60000 obj=11.574 num_tokens=574006",
        "EM sub_iter=1 size=30000 obj=9.9 num_tokens=576247",
        "EM sub_iter=0 size=8800 obj=9.9 num_tokens=576247",
    ):
        progress.read(line)
        shares.append(progress.share)
    assert shares == sorted(shares)
    assert shares[4] == 0.3
    assert 0.95 < shares[-1] < 1
    assert progress.note == "choosing pieces: 8,800 candidates"
