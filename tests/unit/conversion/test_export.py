"""The Hugging Face folder, as transformers itself reads it: hidden states, head, token ids, and back again."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from small_checkpoint import no_file_larger_than, write_state

from deberta_xl.base.command_line import run_tool
from deberta_xl.base.durable import below, write_files
from deberta_xl.base.errors import TokenizerError
from deberta_xl.checkpoint.manifest import CheckpointError, file_facts, step_folder_name, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS
from deberta_xl.conversion.character_map import read_map
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.tokenizer_export import build_normalizer, huggingface_tokenizer, tokenizer_files
from deberta_xl.corpus.python_corpus import python_corpus
from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.data.text_rules import TextRules
from deberta_xl.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, Tokenizer
from deberta_xl.public.fill_mask import encode_with_masks
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.names import to_microsoft
from deberta_xl.weights.native_config import native_config
from tools import convert as tool

VOCAB_SIZE = 1008
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 128}
LAYOUTS = {
    "v2 with convolution": {"conv_kernel_size": 3, "position_buckets": 64},
    "v2": {},
    "own position projections": {"share_att_key": False, "normalize_relative_table": False, "position_buckets": 0},
    "c2p only": {"pos_att_type": "c2p", "position_buckets": 32},
    "all in the input": {"position_biased_input": True, "type_vocab_size": 2},
}
# float32 sums in another order, over states and logits of size 4 to 7: a few units of 5e-7 each, with room.
TOLERANCE = 2e-5
# Lines that normalisation changes, or where spaces, unknown characters and borders might be treated differently.
EDGES = [
    "Ｆｕｌｌ－ｗｉｄｔｈ　ｔｅｘｔ",
    "ﬁne ﬂow of oﬃcial ligatures",
    "“Smart” ‘quotes’ – and — dashes…",
    "café naïve Ünïcödé ß ſ",
    "¹²³ ½ Ⅷ ㎏ ™ © ®",
    "😀 😃a😀b",
    "👨\u200d👩\u200d👧\u200d👦 ❤\ufe0f 1\ufe0f\u20e3",
    "日本語のテスト 中文 한국어 텍스트",
    "Русский текст العربية",
    "xx--yy..zz,,!? a_b.c(d)[e]{f} $5.00 & 10% #@^~`",
]
SPACES = [
    "",
    " ",
    "   ",
    "\t",
    " a",
    "  a  b  ",
    "a\tb\t",
    "a\nb\n",
    "a\r\nb",
    "a\u00a0b\u00a0",
    "\u00a0a",
    "\u3000a\u3000",
]
INVISIBLE = [
    "a\x00b",
    "\x07a\x1bb",
    "a\u200bb",
    "\u200ba\u200b",
    "a\u200b b",
    "a\u200db",
    "\ufeffa",
    "a\u2028b\u2029",
    "\x85a",
]
# Characters that normalisation maps, composes or deletes, and what may follow them in a grapheme.
GRAPHEMES = [
    *"…²ＡﬁｶﾊΩωİẞ½™①ﷺ㎏eéaoô´°👩❤1한한กำ🄸xͅ",
    *("\u00a0", "\u2028", "\ufeff", "\x01", "\r\n", "\r", "\n", " ", "  ", "the"),
    *(
        "\u0301",
        "\u0300",
        "\u0302",
        "\u0323",
        "\u0308",
        "\u3099",
        "\uff9e",
        "\ufe0f",
        "\u200d",
        "\u20e3",
        "\u0338",
        "\U0001f3fd",
    ),
]
# Rules such as "======": several cuttings weigh the same there, and rounding decides between them.
RULER = re.compile(r"([^ ])\1{5}")


def constructed(count: int) -> list[str]:
    """Lines in which marks, joiners and variation selectors follow anything."""
    rng = random.Random(3)
    return ["".join(rng.choices(GRAPHEMES, k=rng.randint(1, 7))) for _ in range(count)]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Lines of English text and code: of the quickstart's corpus."""
    return list(itertools.islice((line for d in python_corpus() for line in d["text"].split("\n")), 20_500))


@pytest.fixture(scope="module")
def tokenizer_folder(lines, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tokenizer"
    train_tokenizer([*lines[::4], *EDGES * 3], VOCAB_SIZE, folder)
    return folder


def random_model(layout: str) -> DebertaForMaskedLM:
    """A model in which every parameter, norms and biases included, has an influence of its own."""
    model = DebertaForMaskedLM(DebertaConfig(**SIZES | LAYOUTS[layout])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, tokenizer_folder, tmp_path_factory) -> tuple[DebertaForMaskedLM, Path]:
    """A model of each layout and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp("layout")
    model = random_model(request.param)
    model.save_pretrained(folder / "native", tokenizer=tokenizer_folder)
    convert(folder / "native", folder / "exported", Conversion(to="huggingface"))
    return model, folder / "exported"


@pytest.fixture(scope="module")
def native(tokenizer_folder, tmp_path_factory) -> tuple[DebertaForMaskedLM, Path]:
    """One model and its weights folder."""
    model = random_model("v2")
    folder = tmp_path_factory.mktemp("native") / "weights"
    model.save_pretrained(folder, tokenizer=tokenizer_folder)
    return model, folder


def test_embeddings_of_another_width_reach_the_encoder_and_come_back(tokenizer_folder, tmp_path, caplog):
    model = DebertaForMaskedLM(DebertaConfig(**SIZES, position_biased_input=True, embedding_size=32)).eval()
    model.save_pretrained(tmp_path / "native", tokenizer=tokenizer_folder)
    convert(tmp_path / "native", tmp_path / "out", Conversion(to="huggingface"))
    assert "AutoModelForMaskedLM" in caplog.text
    input_ids, mask = batch(40)
    back = DebertaForMaskedLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours = back(input_ids, mask, output_hidden_states=True).hidden_states[-1]
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()(input_ids, attention_mask=mask)
    assert largest_difference(ours, theirs.last_hidden_state, mask) <= TOLERANCE


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows: one full, one half full, one nearly empty."""
    generator = torch.Generator().manual_seed(length)
    mask = (torch.arange(length) < torch.tensor([length, length // 2, 5]).unsqueeze(1)).long()
    return torch.randint(4, VOCAB_SIZE, (3, length), generator=generator) * mask, mask


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    """At valid positions; the others mean nothing, and transformers fills them differently."""
    return (ours - theirs)[mask > 0].abs().max().item()


# The model.


@pytest.mark.parametrize("length", [24, 129, 512])
def test_transformers_computes_the_same_hidden_states(exported, length):
    model, folder = exported
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "DebertaV2Model"
    input_ids, mask = batch(length)
    with torch.no_grad():
        our_states = model(input_ids, mask, labels=torch.zeros_like(input_ids), output_hidden_states=True).hidden_states
        their_states = theirs(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(our_states) == len(their_states) == SIZES["num_layers"] + 1
    for ours, others in zip(our_states, their_states, strict=True):
        assert largest_difference(ours, others, mask) <= TOLERANCE


def test_transformers_applies_the_head_to_the_last_layer_and_misses_no_weight(exported):
    model, folder = exported
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    input_ids, mask = batch(48)
    with torch.no_grad():
        states = model(input_ids, mask, labels=torch.zeros_like(input_ids), output_hidden_states=True).hidden_states
        expected = model.head(states[-1], model.embeddings.word)
        logits = theirs.eval()(input_ids, attention_mask=mask).logits
    assert largest_difference(expected, logits, mask) <= TOLERANCE


def test_the_encoder_alone_misses_no_weight_and_leaves_only_the_head(exported):
    _, folder = exported
    _, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.startswith("lm_predictions.") for name in report["unexpected_keys"])


def test_the_way_back_gives_the_same_model_to_the_bit(exported):
    model, folder = exported
    back = DebertaForMaskedLM.from_pretrained(folder)
    expected = dict(model.named_parameters())
    assert {name for name, _ in back.named_parameters()} == set(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in back.named_parameters())
    input_ids, mask = batch(40)
    with torch.no_grad():
        assert torch.equal(back(input_ids, mask).logits, model(input_ids, mask).logits)


def test_the_word_table_is_stored_once_and_every_tensor_has_the_original_releases_name(native, tmp_path):
    model, folder = native
    convert(folder, tmp_path / "out", Conversion(to="huggingface"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == {to_microsoft(name) for name, _ in model.named_parameters()}
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_type_asked_for_and_transformers_loads_them_in_it(native, tmp_path, dtype):
    model, folder = native
    convert(folder, tmp_path / "out", Conversion(to="huggingface", dtype=dtype))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[to_microsoft(n)], p.to(dtype)) for n, p in model.named_parameters())
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").dtype == dtype


def test_a_run_folder_stands_for_its_newest_checkpoint_of_any_layout(native, tmp_path):
    model, folder = native
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for step, factor in {1: 3.0, 2: 1.0}.items():
        checkpoint = tmp_path / "run" / "checkpoints" / step_folder_name(step)
        state = {kind: {name: factor * weight for name, weight in weights.items()} for kind in KINDS}
        names = [path.name for path in write_state(checkpoint, state, cuts=[1000, 77777])]
        config = json.dumps(native_config(model.config)).encode()
        trained = {"state.json": json.dumps({"step": step, "fingerprints": {"sequence_length": 12}}).encode()}
        names += write_files(
            checkpoint,
            {"config.json": config} | trained | below("tokenizer", Tokenizer.load(folder / "tokenizer").files()),
        )
        write_manifest(checkpoint, {name: file_facts(checkpoint / name) for name in names})
    convert(tmp_path / "run", tmp_path / "out", Conversion(to="huggingface"))
    back = DebertaForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in back.named_parameters())
    # The length that was trained, not the longest that the tables hold.
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 12


@pytest.mark.parametrize("kind", ["huggingface", "microsoft"])
def test_the_tokenizer_comes_back_with_the_models_spare_ids(native, tokenizer_folder, tmp_path, kind):
    convert(native[1], tmp_path / "there", Conversion(to=kind))
    assert (tmp_path / "there" / "spm.model").read_bytes() == (tokenizer_folder / "spm.model").read_bytes()
    convert(tmp_path / "there", tmp_path / "back", Conversion(to="native", tolerance=0.0))
    assert Tokenizer.load(tmp_path / "back" / "tokenizer").fingerprint == Tokenizer.load(tokenizer_folder).fingerprint


# What is refused, with nothing left behind.


def refuses(source: Path, destination: Path, words: str, **options: torch.dtype) -> None:
    """The export fails with `words`; what was at the destination, or not, stays as it was."""
    before = sorted(destination.parent.iterdir())
    with pytest.raises(CheckpointError, match=words):
        convert(source, destination, Conversion(to="huggingface", **options))
    assert sorted(destination.parent.iterdir()) == before


def test_an_existing_destination_is_refused_and_kept(native, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refuses(native[1], tmp_path / "out", "exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_missing_source_is_refused(tmp_path):
    refuses(tmp_path / "nowhere", tmp_path / "out", "nowhere")


def test_weights_too_large_for_float16_are_refused_by_name(tmp_path):
    model = random_model("v2")
    with torch.no_grad():
        model.encoder.layers[1].feed_forward.up.bias[3] = 1e5
    model.save_pretrained(tmp_path / "native")
    refuses(tmp_path / "native", tmp_path / "out", r"layers\.1\.feed_forward\.up\.bias.*bfloat16", dtype=torch.float16)


def test_damaged_weights_are_refused(native, tmp_path):
    native[0].save_pretrained(tmp_path / "native")
    file = tmp_path / "native" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refuses(tmp_path / "native", tmp_path / "out", "damaged")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(native, tokenizer_folder, tmp_path):
    small = DebertaForMaskedLM(DebertaConfig(**SIZES | {"vocab_size": VOCAB_SIZE - 20}))
    small.save_pretrained(tmp_path / "native", tokenizer=tokenizer_folder)
    refuses(tmp_path / "native", tmp_path / "out", "they do not belong together")


def test_an_attention_that_transformers_lacks_is_refused(tmp_path):
    DebertaForMaskedLM(DebertaConfig(**SIZES, head_dim=8)).save_pretrained(tmp_path / "native")
    refuses(tmp_path / "native", tmp_path / "out", "hidden_size=64")


def test_a_failed_write_leaves_nothing(native, tmp_path):
    with no_file_larger_than(100_000):
        refuses(native[1], tmp_path / "out", "File too large")


def test_a_model_without_tokenizer_is_exported_without_one(native, tmp_path, caplog):
    native[0].save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "out", Conversion(to="huggingface"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert "no tokenizer" in caplog.text


# The tokenizer.


@pytest.fixture(scope="module")
def automatic(tokenizer_folder, tmp_path_factory) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that a user of transformers gets from an exported folder."""
    folder = tmp_path_factory.mktemp("automatic")
    random_model("v2").save_pretrained(folder / "native", tokenizer=tokenizer_folder)
    convert(folder / "native", folder / "exported", Conversion(to="huggingface"))
    return transformers.AutoTokenizer.from_pretrained(folder / "exported")


def test_transformers_gives_sentencepieces_ids_on_twenty_thousand_real_lines(automatic, tokenizer_folder, lines):
    tokenizer = Tokenizer.load(tokenizer_folder)
    texts = [*lines, *EDGES, *SPACES, *INVISIBLE]
    assert len(texts) > 20_000
    theirs = automatic(texts, add_special_tokens=False).input_ids
    pairs = zip(texts, tokenizer.encode_batch(texts), theirs, strict=True)
    assert [text for text, ours, ids in pairs if ours.tolist() != ids] == []


def test_a_mark_or_joiner_behind_a_mapped_character_is_kept_as_sentencepiece_keeps_it(automatic, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    texts = [
        "…\u0301",
        "²\ufe0f",
        "\u00a0\u200d",
        "Ａ\u0301",
        "ﬁ\u0301",
        "e\u0323\u0302",
        "ｶ\uff9e",
        *constructed(3000),
    ]
    theirs = automatic(texts, add_special_tokens=False).input_ids
    pairs = zip(texts, tokenizer.encode_batch(texts), theirs, strict=True)
    assert [text for text, ours, ids in pairs if ours.tolist() != ids] == []


def test_places_are_the_exported_tokenizers_offsets_without_spaces(automatic, tokenizer_folder, lines):
    tokenizer = Tokenizer.load(tokenizer_folder)
    for text in (*lines[:1500], *EDGES):
        ids, places = tokenizer.encode_with_places(text)
        theirs = automatic(text, add_special_tokens=False, return_offsets_mapping=True)
        assert theirs.input_ids == ids == tokenizer.encode(text).tolist()
        for number, ours, (start, stop) in zip(ids, places.tolist(), theirs.offset_mapping, strict=True):
            while start < stop and text[start].isspace():
                start += 1
            # A word mark alone has no character here, and the first one of the text there.
            assert ours == [start, stop] or tokenizer.id_to_piece(number) == "▁", text


def test_what_a_map_says_beyond_compositions_is_applied_or_counted(tmp_path, caplog):
    for count, warns in ((3, False), (100, True)):
        rules = {f"{chr(0x100 + number)}xy": chr(0x100 + number) + "z" for number in range(count)}
        (tmp_path / "rules.tsv").write_text(
            "".join(
                f"{' '.join(f'{ord(c):X}' for c in a)}\t{' '.join(f'{ord(c):X}' for c in b)}\n"
                for a, b in rules.items()
            )
        )
        model = sentencepiece.SentencePieceNormalizer(rule_tsv=str(tmp_path / "rules.tsv"))
        spec = ModelProto.FromString(model.serialized_model_proto()).normalizer_spec
        assert read_map(spec.precompiled_charsmap) == rules
        normalizer = build_normalizer(spec, TextRules())
        assert ("normalises 100 sequences of characters in another way" in caplog.text) == warns
        if not warns:
            assert normalizer.normalize_str("aĀxyāxyxy") == "aĀzāzxy"


@pytest.mark.parametrize("special", [*SPECIAL_PIECES, MASK_PIECE])
def test_a_special_tokens_letters_are_text_to_us_and_the_token_to_transformers(automatic, tokenizer_folder, special):
    tokenizer = Tokenizer.load(tokenizer_folder)
    number = tokenizer.special_ids[special]
    text = f"a {special} b"
    assert number == tokenizer.unk_id or number not in tokenizer.encode(text)
    assert number in automatic(text, add_special_tokens=False).input_ids


def test_specials_have_their_ids_and_spare_ids_have_no_name(automatic, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    names = {name: getattr(automatic, f"{name}_token_id") for name in ("pad", "cls", "sep", "unk", "mask")}
    assert names == {"pad": 0, "cls": 1, "sep": 2, "unk": 3, "mask": tokenizer.num_pieces}
    assert len(automatic) == tokenizer.num_pieces + 1 < tokenizer.vocab_size
    assert automatic.model_max_length == 512


def test_one_text_and_two_are_framed_padded_and_cut_as_the_model_expects(automatic):
    first, second = (automatic(text, add_special_tokens=False).input_ids for text in ("a function", "the list"))
    pair = automatic("a function", "the list")
    assert automatic("a function").input_ids == [1, *first, 2]
    assert pair.input_ids == [1, *first, 2, *second, 2]
    assert pair.token_type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    padded = automatic(["a function", "a function of the list"], padding=True, truncation=True, max_length=5)
    assert len(padded.input_ids[0]) == len(padded.input_ids[1]) <= 5


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the [MASK] of", ["▁the", "[MASK]", "▁of"]),
        ("the [MASK]ing", ["▁the", "[MASK]", "ing"]),
        ("[MASK] of the  [MASK]\t[MASK]", ["[MASK]", "▁of", "▁the", "[MASK]", "[MASK]"]),
        ("the[MASK].", ["▁the", "[MASK]", "."]),
    ],
)
def test_a_mask_takes_the_space_before_it_and_no_other(automatic, text, pieces):
    assert automatic.convert_ids_to_tokens(automatic(text, add_special_tokens=False).input_ids) == pieces


def test_text_comes_back_from_ids(automatic, tokenizer_folder, lines):
    tokenizer = Tokenizer.load(tokenizer_folder)
    ids = [tokenizer.encode(line).tolist() for line in lines[:500]]
    for known in (i for i in ids if tokenizer.unk_id not in i):
        assert automatic.decode([1, *known, 2], skip_special_tokens=True) == tokenizer.decode(known)


def train(lines: list[str], **options: object) -> Tokenizer:
    """A small tokenizer trained by SentencePiece with other options than ours."""
    model = io.BytesIO()
    specials = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    names = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=500, minloglevel=2, **specials | names | options
    )
    return Tokenizer(model.getvalue())


TRAINER_OPTIONS = {
    "byte fallback": {"byte_fallback": True},
    "no normalisation": {"normalization_rule_name": "identity"},
    "case folding": {"normalization_rule_name": "nmt_nfkc_cf"},
    "extra spaces kept": {"remove_extra_whitespaces": False},
    "no first space": {"add_dummy_prefix": False},
    "neither": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "pieces of several words": {"split_by_whitespace": False},
}


@pytest.mark.parametrize("options", TRAINER_OPTIONS)
def test_other_options_of_sentencepiece_are_honoured(lines, options):
    tokenizer = train(lines[:1500], **TRAINER_OPTIONS[options])
    converted = huggingface_tokenizer(tokenizer)
    texts = [t for t in [*lines[:1500], *EDGES, *SPACES, *INVISIBLE, *constructed(1000)] if not RULER.search(t)]
    encodings = converted.encode_batch(texts, add_special_tokens=False)
    different = [t for t, e in zip(texts, encodings, strict=True) if tokenizer.encode(t).tolist() != e.ids]
    assert not different
    plain = [text for text in texts[:1500] if text.isascii()]
    known = [ids for text in plain if tokenizer.unk_id not in (ids := tokenizer.encode(text).tolist())]
    assert all(converted.decode(ids) == tokenizer.processor.decode(ids) for ids in known)


@pytest.mark.parametrize("options", ["byte fallback", "no normalisation", "case folding", "neither"])
def test_masks_are_read_as_our_own_filling_does_with_other_options_too(lines, options):
    tokenizer = train(lines[:1500], **TRAINER_OPTIONS[options])
    converted = huggingface_tokenizer(tokenizer)
    for text in ("the [MASK] of", "the[MASK]ed.", "[MASK] of the  [MASK][MASK]"):
        assert converted.encode(text).ids == encode_with_masks(tokenizer, text)


def test_a_users_own_pieces_are_never_cut(lines, tmp_path):
    tokenizer = train(lines[:500], user_defined_symbols=["<gene>"])
    converted = huggingface_tokenizer(tokenizer)
    for text in ("the <gene> of", "the<gene>of <gene>", "of <gene><gene>."):
        assert converted.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
        assert tokenizer.encode_with_places(text)[0] == tokenizer.encode(text).tolist()
    write_files(tmp_path, tokenizer_files(tokenizer, 512))
    assert Tokenizer.load(tmp_path).rules.is_plain


@pytest.mark.parametrize("options", [{"model_type": "bpe"}, {"treat_whitespace_as_suffix": True}])
def test_a_sentencepiece_model_of_another_kind_is_refused(lines, options):
    with pytest.raises(TokenizerError, match="can be exported"):
        huggingface_tokenizer(train(lines[:500], **options))


# The tool.


def test_the_tool_converts_and_says_what_it_wrote(native, tmp_path, capsys):
    arguments = [
        "--from",
        "native",
        "--to",
        "huggingface",
        "--dtype",
        "bfloat16",
        str(native[1]),
        str(tmp_path / "out"),
    ]
    assert run_tool(tool.run, tool.parse_arguments(arguments)) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_predictions.lm_head.bias"].dtype == torch.bfloat16


def test_the_tool_says_in_one_line_what_is_wrong(tmp_path, capsys):
    assert (
        run_tool(tool.run, tool.parse_arguments(["--to", "native", str(tmp_path / "none"), str(tmp_path / "out")])) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# The documentation.


def test_the_documented_lines_give_transformers_the_enhanced_mask_decoder(native, tmp_path, monkeypatch, capsys):
    model, folder = native
    convert(folder, tmp_path / "exported", Conversion(to="huggingface"))
    page = (Path(__file__).parents[3] / "docs" / "conversion.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(program, "docs/conversion.md", "exec"), names)
    with torch.no_grad():
        expected = model(names["inputs"].input_ids).logits
    assert (names["logits"] - expected).abs().max() <= TOLERANCE
    assert capsys.readouterr().out.count("'") == 10


def test_the_model_card_says_what_is_recorded_and_nothing_else(native, tmp_path):
    convert(native[1], tmp_path / "out", Conversion(to="huggingface", with_card=True))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| parameters | {sum(p.numel() for p in native[0].parameters()):,} |" in card
    assert card.count("Not recorded with these weights.") == 3
    assert "## Intended use" in card
