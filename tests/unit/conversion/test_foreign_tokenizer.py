"""Added tokens and other settings of transformers' tokenizers: applied exactly, or refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from small_dataset import documents
from tokenizers import AddedToken

from deberta_xl.base.errors import TokenizerError
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert, open_pretrained
from deberta_xl.conversion.verify import compare_tokenizers
from deberta_xl.corpus.token_batches import BatchTokenizer, worker_arguments
from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.fill_mask import encode_with_masks
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "position_buckets": 8}
#: What constructed lines are made of: added tokens, halves of them, spaces, punctuation, other cases.
BITS = [
    *("[E1]", "[/E1]", "[E", "1]", "<ent>", "Foo", "foo", "the value", "THE VALUE", "The", "value", "import", "İσΣ"),
    *(" ", "  ", "\t", "\n", " ", ".", ",", " ,", "(", "don't", "x", "7", "class Name"),
]


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory) -> bytes:
    """A SentencePiece model of 300 pieces."""
    folder = tmp_path_factory.mktemp("pieces") / "tokenizer"
    train_tokenizer(documents(), 308, folder)
    return (folder / "spm.model").read_bytes()


@pytest.fixture
def release(spm_model, tmp_path) -> Path:
    """The tokenizer's part of a released folder, as transformers 4 writes it."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "spm.model").write_bytes(spm_model)
    write(folder, "config.json", {"model_type": "deberta-v2", "vocab_size": 320})
    write(folder, "added_tokens.json", {"[MASK]": 300})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False})
    return folder


def write(folder: Path, name: str, fields: object) -> None:
    """A JSON file."""
    (folder / name).write_text(json.dumps(fields))


def change(folder: Path, name: str, **fields: object) -> None:
    """Change fields of a JSON file."""
    path = folder / name
    write(folder, name, (json.loads(path.read_text()) if path.is_file() else {}) | fields)


def add_tokens(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Add tokens of all kinds as a user does, and save them beside `spm.model`."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["the value", AddedToken("Foo", single_word=True, lstrip=True, normalized=False)])
    theirs.add_special_tokens({"additional_special_tokens": ["<ent>", AddedToken("[E1]", rstrip=True), "[/E1]"]})
    theirs.save_pretrained(folder)
    return theirs


def lines(count: int) -> list[str]:
    """Constructed lines."""
    rng = random.Random(1)
    return ["".join(rng.choices(BITS, k=rng.randint(1, 8))) for _ in range(count)]


def assert_same_ids(tokenizer: Tokenizer, theirs: transformers.PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Both give the same ids."""
    expected = theirs(texts, add_special_tokens=False).input_ids
    found = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert [(t, o, e) for t, o, e in zip(texts, found, expected, strict=True) if o != e] == []


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("splits", [False, True])
def test_added_tokens_lower_casing_and_splitting_give_the_ids_of_transformers(release, lower, splits):
    change(release, "tokenizer_config.json", do_lower_case=lower, split_by_punct=splits)
    theirs = add_tokens(release)
    tokenizer = Tokenizer.load(release)
    assert [token.content for token in tokenizer.rules.added] == ["the value", "Foo", "<ent>", "[E1]", "[/E1]"]
    assert (tokenizer.vocab_size, tokenizer.piece_to_id("[E1]")) == (320, theirs.convert_tokens_to_ids("[E1]"))
    assert_same_ids(tokenizer, theirs, lines(400))
    assert_same_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(release), lines(100))


def test_tokens_of_the_older_files_are_read_too(release):
    write(release, "added_tokens.json", {"[MASK]": 300, "[E1]": 301, "the value": 302})
    change(release, "tokenizer_config.json", additional_special_tokens=["[E1]"])
    write(release, "special_tokens_map.json", {"mask_token": {"content": "[MASK]", "lstrip": True}})
    tokenizer = Tokenizer.load(release)
    assert tokenizer.special[301]
    assert not tokenizer.special[302]
    assert_same_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(release), lines(100))
    flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    change(release, "tokenizer_config.json", added_tokens_decoder={"301": {"content": "[E1]"} | flags})
    assert Tokenizer.load(release).rules.added[0].lstrip


def test_of_two_files_with_other_flags_the_one_counts_that_transformers_takes(release, whole):
    flags = {"content": "[E1]", "lstrip": False, "rstrip": False, "single_word": False, "special": False}
    fields = json.loads(whole)
    fields["added_tokens"].append(flags | {"id": 301, "normalized": True})
    write(release, "tokenizer.json", fields)
    mask = {"300": flags | {"content": "[MASK]", "normalized": False, "special": True}}
    change(release, "tokenizer_config.json", added_tokens_decoder=mask | {"301": flags | {"normalized": False}})
    theirs = transformers.AutoTokenizer.from_pretrained(release)
    assert Tokenizer.load(release).rules.added[0].normalized == theirs.added_tokens_decoder[301].normalized
    assert_same_ids(Tokenizer.load(release), theirs, lines(50))


def test_places_and_masks_know_added_tokens(release):
    add_tokens(release)
    tokenizer = Tokenizer.load(release)
    text = "  The [E1] ﬁle[/E1]of  the value, x"
    ids, places = tokenizer.encode_with_places(text)
    assert ids == tokenizer.encode(text).tolist()
    shown = {tokenizer.id_to_piece(i): text[start:stop] for i, (start, stop) in zip(ids, places, strict=True)}
    assert (shown["[E1]"].strip(), shown["[/E1]"], shown["the value"]) == ("[E1]", "[/E1]", "the value")
    covered = {place for start, stop in places for place in range(start, stop)}
    assert covered >= {number for number, character in enumerate(text) if not character.isspace()}
    assert tokenizer.decode(tokenizer.encode("x [E1] x")) == "x [E1] x"
    masked = encode_with_masks(tokenizer, "The [MASK]ing [E1] [MASK] x")
    pieces = [tokenizer.id_to_piece(i) for i in masked]
    assert pieces.count("[MASK]") == 2
    assert "[E1]" in pieces
    assert not pieces[pieces.index("[MASK]") + 1].startswith("▁")


CONFIG, ADDED, SPECIALS = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
#: What is refused: words of the message, and the fields of a file that say it.
REFUSED: dict[str, tuple[str, str, dict]] = {
    "another mask": ("mask_token is '<mask>'", CONFIG, {"mask_token": "<mask>"}),
    "another [CLS]": ("cls_token is '<s>'", SPECIALS, {"cls_token": {"content": "<s>"}}),
    "another class": ("'BertJapaneseTokenizer'", CONFIG, {"tokenizer_class": "BertJapaneseTokenizer"}),
    "no prefix": ("add_prefix_space is False", CONFIG, {"add_prefix_space": False}),
    "sampling": ("enable_sampling=True", CONFIG, {"sp_model_kwargs": {"enable_sampling": True}}),
    "gpt2": ("vocab_type is 'gpt2'", "config.json", {"vocab_type": "gpt2"}),
    "own code": ("auto_map", CONFIG, {"auto_map": {"AutoTokenizer": ["x.X", None]}}),
    "cut on the left": ("truncation_side is 'left'", CONFIG, {"truncation_side": "left"}),
    "mask elsewhere": ("the id 310, spm.model 300", ADDED, {"[MASK]": 310}),
    "a piece's id": ("which is another piece's", ADDED, {"[E1]": 17}),
    "two ids": ("another file 301", CONFIG, {"added_tokens_decoder": {"301": {"content": "[E1]"}}}),
    "one id": ("have one id", ADDED, {"[E1]": 301, "[E2]": 301}),
    "no id": ("no file gives its id", SPECIALS, {"additional_special_tokens": ["<x>"]}),
    "no row": ("no row for it", ADDED, {"[E1]": 320}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_here_is_refused_by_name(case, release):
    words, name, fields = REFUSED[case]
    assert Tokenizer.load(release).rules.is_plain
    if case == "two ids":
        change(release, ADDED, **{"[E1]": 302})
    change(release, name, **fields)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(release)
    assert words in str(caught.value)


CONTRADICTIONS: dict[str, tuple[str, Callable[[dict], object]]] = {
    "another piece": ("piece 50 is 'other'", lambda j: j["model"]["vocab"].__setitem__(50, ["other", -1.0])),
    "another weight": ("weighs", lambda j: j["model"]["vocab"].__setitem__(50, [j["model"]["vocab"][50][0], -1.0])),
    "fewer pieces": ("has 299 pieces", lambda j: j["model"]["vocab"].pop()),
    "no unigram": ("holds a BPE model", lambda j: j["model"].update(type="BPE")),
    "digits": ("replaces '[0-9]'", lambda j: j["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "0"})),
    "accents": ("a step 'StripAccents'", lambda j: j["normalizer"]["normalizers"].append({"type": "StripAccents"})),
    "case": ("the contrary", lambda j: j["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})),
    "digits apart": ("a step 'Digits'", lambda j: j["pre_tokenizer"]["pretokenizers"].append({"type": "Digits"})),
    "no frame": ("frames a single text", lambda j: j.update(post_processor=None)),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(spm_model, tmp_path_factory) -> bytes:
    """The tokenizer.json that transformers makes of the model."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "spm.model").write_bytes(spm_model)
    write(folder, "config.json", {"model_type": "deberta-v2", "vocab_size": 320})
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_tokenizer_json_that_contradicts_spm_model_is_refused(case, release, whole):
    words, damage = CONTRADICTIONS[case]
    (release / "tokenizer.json").write_bytes(whole)
    assert Tokenizer.load(release).rules.is_plain
    fields = json.loads(whole)
    damage(fields)
    write(release, "tokenizer.json", fields)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(release)
    assert words in str(caught.value)


def test_rules_travel_in_our_own_layout_and_are_part_of_the_fingerprint(release, tmp_path):
    plain = Tokenizer.load(release)
    add_tokens(release)
    tokenizer = Tokenizer.load(release)
    tokenizer.save(tmp_path / "ours")
    again = Tokenizer.load(tmp_path / "ours")
    assert again.fingerprint == tokenizer.fingerprint != plain.fingerprint
    assert again.has_same_ids(tokenizer)
    assert not again.has_same_ids(plain)
    assert "adds 'the value' (301)" in plain.difference_from(tokenizer)
    assert json.loads((tmp_path / "ours" / "tokenizer_settings.json").read_text())["version"] == 2


def test_a_process_that_tokenises_in_parallel_knows_the_rules(release):
    write(release, ADDED, {"[MASK]": 300, "[E1]": 301})
    tokenizer = Tokenizer.load(release)
    spm_model, vocab_size, rules, *_ = worker_arguments(BatchTokenizer(tokenizer, "text", 0.0))
    assert Tokenizer(spm_model, vocab_size, rules=rules).fingerprint == tokenizer.fingerprint


def save_model(folder: Path) -> None:
    """Weights for the release's tokenizer, resized for its added tokens."""
    model = DebertaForMaskedLM(DebertaConfig(vocab_size=320, **SIZES))
    model.save_pretrained(folder.parent / "native")
    convert(folder.parent / "native", folder.parent / "weights", Conversion(to="huggingface"))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder.parent / "weights" / name, folder)


def test_a_model_resized_for_added_tokens_goes_both_ways_and_transformers_reads_the_same_ids(release, tmp_path):
    save_model(release)
    theirs = add_tokens(release)
    shown: list[str] = []
    conversion = {"tolerance": 0.0, "show": shown.append}
    convert(release, tmp_path / "start", Conversion(to="native", **conversion))
    convert(tmp_path / "start", tmp_path / "back", Conversion(to="huggingface", **conversion))
    assert sum("the same" in line for line in shown) == 2
    for folder in (tmp_path / "start" / "tokenizer", tmp_path / "back"):
        assert_same_ids(Tokenizer.load(folder), theirs, lines(100))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert exported(lines(300)).input_ids == theirs(lines(300)).input_ids
    assert "<ent>" in exported.all_special_tokens
    before, after = (DebertaForMaskedLM.from_pretrained(folder) for folder in (release, tmp_path / "back"))
    assert torch.equal(before.embeddings.word.weight, after.embeddings.word.weight)
    with pytest.raises(CheckpointError, match="the original code has only"):
        convert(release, tmp_path / "original", Conversion(to="microsoft"))
    # What a user adds to an exported folder later is not passed over, either.
    exported.add_tokens(["Zed"])
    exported.save_pretrained(tmp_path / "back")
    with pytest.raises(TokenizerError, match=r"'Zed' \(306\).*Delete tokenizer_settings\.json"):
        Tokenizer.load(tmp_path / "back")


def test_the_comparison_finds_an_added_token_or_a_rule_that_got_lost(release, tmp_path):
    save_model(release)
    convert(release, tmp_path / "plain", Conversion(to="native"))
    written = open_pretrained(tmp_path / "plain")
    compare_tokenizers(open_pretrained(release), written, lambda _line: None)
    change(release, "tokenizer_config.json", do_lower_case=True)
    with pytest.raises(CheckpointError, match="gives other ids"):
        compare_tokenizers(open_pretrained(release), written, lambda _line: None)
    change(release, "tokenizer_config.json", do_lower_case=False)
    write(release, "added_tokens.json", {"[MASK]": 300, "[E1]": 301})
    with pytest.raises(CheckpointError, match=r"gives other ids .* \[E1\]"):
        compare_tokenizers(open_pretrained(release), written, lambda _line: None)
    shutil.rmtree(tmp_path / "plain" / "tokenizer")
    with pytest.raises(CheckpointError, match="has not the tokenizer"):
        compare_tokenizers(open_pretrained(release), open_pretrained(tmp_path / "plain"), lambda _line: None)


def test_a_damaged_file_beside_the_model_is_named(release):
    (release / ADDED).write_text("{")
    with pytest.raises(TokenizerError, match=r"added_tokens\.json is damaged"):
        Tokenizer.load(release)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (ADDED, {"[E1]": None}),
        (ADDED, {"[E1]": -3}),
        (CONFIG, {"added_tokens_decoder": [1]}),
        (CONFIG, {"added_tokens_decoder": {"x": {"content": 5}}}),
        (CONFIG, {"additional_special_tokens": 7}),
        (CONFIG, {"sp_model_kwargs": "none"}),
        ("tokenizer.json", {"model": {"vocab": [1, 2]}}),
        ("tokenizer.json", {"added_tokens": "all"}),
        ("tokenizer.json", {"normalizer": "NFC"}),
    ],
)
def test_files_of_another_form_are_an_error_for_people(release, name, fields):
    change(release, name, **fields)
    with pytest.raises(TokenizerError, match=r"tokenizer's files ask for|has another form"):
        Tokenizer.load(release)


def test_the_models_own_number_of_rows_counts_where_its_configuration_lies_beside(release):
    assert Tokenizer.load(release).vocab_size == 320
    assert Tokenizer.load(release, 330).vocab_size == 330
    (release / "config.json").unlink()
    assert Tokenizer.load(release).vocab_size == 301
