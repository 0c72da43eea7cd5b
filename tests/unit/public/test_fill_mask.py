"""Filling masks: what the model sees, what may be proposed, and how it is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
import torch

from deberta_xl.base.command_line import run_tool
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.tokenizer_export import huggingface_tokenizer
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.fill_mask import FillMaskError, encode_with_masks, fill_mask, fill_masks, put
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.foreign_config import to_huggingface_config
from deberta_xl.weights.named_folder import find_tokenizer
from deberta_xl.weights.names import to_microsoft
from deberta_xl.weights.native_config import Learnt
from tools import fill_mask as tool

EXTRA_ROWS = 4
"""Rows of the word table beyond the tokenizer's: they have no meaning at all."""


@pytest.fixture(scope="module")
def tokenizer(small_dataset) -> Tokenizer:
    return small_dataset.tokenizer


@pytest.fixture
def model(tokenizer) -> DebertaForMaskedLM:
    """A tiny model with convolution whose predictions depend on everything."""
    config = DebertaConfig(
        vocab_size=tokenizer.vocab_size + EXTRA_ROWS, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
        max_position_embeddings=48, position_buckets=8, conv_kernel_size=3,
    )  # fmt: skip
    model = DebertaForMaskedLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The pieces the model sees, without [CLS] and [SEP]."""
    ids = encode_with_masks(tokenizer, text)
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    return [tokenizer.id_to_piece(i) for i in ids[1:-1]]


# What the model sees.


def test_a_text_without_mask_has_the_ids_of_pretraining(tokenizer):
    lines = [line for name in sorted(topics)[:10] for line in topics[name].splitlines()]
    for line in [*lines, "", " ", " a  b ", "ﬁne — “x”", "0", "0 0", "\u200bx", "＄ ５"]:
        assert encode_with_masks(tokenizer, line)[1:-1] == tokenizer.encode(line).tolist()


def test_a_masked_word_leaves_the_ids_around_it_as_they_were(tokenizer):
    hidden_words = {"the", "of", "a"}
    for name in sorted(topics)[:40]:
        words = [*topics[name].split()[:60], "the", "end"]
        # SentencePiece cuts each word by itself.
        ids = [[tokenizer.mask_id] if word in hidden_words else tokenizer.encode(word).tolist() for word in words]
        text = " ".join("[MASK]" if word in hidden_words else word for word in words)
        assert encode_with_masks(tokenizer, text)[1:-1] == [i for word in ids for i in word]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the [MASK] of", ["▁the", "[MASK]", "▁of"]),
        ("the [MASK]ed", ["▁the", "[MASK]", "ed"]),
        ("the[MASK] ed", ["▁the", "[MASK]", "▁", "ed"]),
        ("[MASK] of", ["[MASK]", "▁of"]),
        ("[MASK][MASK]  [MASK] ", ["[MASK]"] * 3),
        ("the [MASK]\u00a0of", ["▁the", "[MASK]", "▁of"]),
    ],
)
def test_a_mask_takes_the_space_before_it_and_no_other(tokenizer, text, expected):
    assert pieces(tokenizer, text) == expected


@pytest.mark.parametrize("text", ["the [MASK] of", "a[MASK]ed.", "[MASK]0 [MASK], 0[MASK]", " the  [MASK]\t[MASK]ing "])
def test_the_exported_tokenizer_sees_masks_as_we_do(tokenizer, text):
    assert huggingface_tokenizer(tokenizer).encode(text).ids == encode_with_masks(tokenizer, text)


# What is proposed.


def test_probabilities_are_those_of_the_model_among_ordinary_pieces(model, tokenizer):
    text = "the [MASK] of a [MASK] is"
    input_ids = torch.tensor([encode_with_masks(tokenizer, text)])
    with torch.no_grad():
        logits = model(input_ids).logits[0, input_ids[0] == tokenizer.mask_id]
    logits[:, torch.from_numpy(~tokenizer.special).logical_not().nonzero().flatten()] = -torch.inf
    logits[:, tokenizer.vocab_size :] = -torch.inf
    expected = torch.softmax(logits, dim=-1)
    answers = fill_mask(model, tokenizer, text, top_k=7)
    assert [len(guesses) for guesses in answers] == [7, 7]
    for row, guesses in zip(expected, answers, strict=True):
        best = row.topk(7)
        assert [guess.token_id for guess in guesses] == best.indices.tolist()
        # The same float32 numbers, decoded together or alone.
        assert [guess.probability for guess in guesses] == pytest.approx(best.values.tolist(), rel=1e-5)
        assert all(guess.piece == tokenizer.id_to_piece(guess.token_id) for guess in guesses)


def test_many_texts_are_filled_as_each_alone_in_their_order(model, tokenizer):
    words = ["the", "of", "[MASK]", "a", "class", "is"]
    texts = [" ".join(["[MASK]", *(words * 6)[number : 2 * number]]) for number in (1, 15, 2, 9, 14, 3, 1)]
    filled = fill_masks(model, tokenizer, texts)
    for text, answers in zip(texts, filled, strict=True):
        alone = fill_mask(model, tokenizer, text)
        assert [[guess.text for guess in guesses] for guesses in answers] == [
            [guess.text for guess in guesses] for guesses in alone
        ]
        for together, single in zip(answers, alone, strict=True):
            # The same float32 numbers, summed in another order beside padding.
            assert [g.probability for g in together] == pytest.approx([g.probability for g in single], rel=1e-5)
    with pytest.raises(FillMaskError, match=r"text 2 of 2: the text has no \[MASK\]"):
        fill_masks(model, tokenizer, ["[MASK]", "the"])


def test_all_ordinary_pieces_together_have_probability_one(model, tokenizer):
    (guesses,) = fill_mask(model, tokenizer, "[MASK]", top_k=int((~tokenizer.special).sum()))
    assert sum(guess.probability for guess in guesses) == pytest.approx(1, abs=1e-5)


def test_specials_and_spare_ids_are_never_proposed(model, tokenizer):
    with torch.no_grad():
        model.head.bias[:4] += 100
        model.head.bias[tokenizer.mask_id :] += 100
        model.head.bias[tokenizer.piece_to_id("▁class")] += 50
    (guesses,) = fill_mask(model, tokenizer, "the [MASK] of", top_k=3)
    assert (guesses[0].piece, guesses[0].text) == ("▁class", "the class of")
    assert guesses[0].probability > 0.99
    assert all(4 <= guess.token_id < tokenizer.num_pieces for guess in guesses)


@pytest.mark.parametrize(
    ("piece", "number", "filled"),
    [
        ("▁cat", 0, "A cat and [MASK]."),
        ("▁cat", 1, "A [MASK] and cat."),
        ("s", 0, "As and [MASK]."),
        ("▁", 1, "A [MASK] and ."),
    ],
)
def test_the_piece_brings_its_own_space_into_the_text(piece, number, filled):
    assert put(piece, "A [MASK] and [MASK].", number) == filled


def test_a_piece_at_the_beginning_brings_no_space():
    assert put("▁Cats", "[MASK] sleep", 0) == "Cats sleep"


# What is refused.


def test_a_text_without_mask_is_refused_with_an_example(model, tokenizer):
    with pytest.raises(FillMaskError, match=r"no \[MASK\].*capital of \[MASK\]"):
        fill_mask(model, tokenizer, "the [mask] of")


def test_a_text_beyond_the_position_table_is_refused_and_one_that_fills_it_is_not(model, tokenizer):
    fill_mask(model, tokenizer, "[MASK]" * 46)
    with pytest.raises(FillMaskError, match=r"49 tokens.*48"):
        fill_mask(model, tokenizer, "[MASK]" * 47)


@pytest.mark.parametrize("top_k", [0, -1, 497])
def test_an_impossible_number_of_proposals_is_refused(model, tokenizer, top_k):
    with pytest.raises(FillMaskError, match=f"top_k={top_k}.*1 … 496"):
        fill_mask(model, tokenizer, "[MASK]", top_k=top_k)


def test_a_text_that_is_not_utf8_is_refused(model, tokenizer):
    # What Python makes of the byte FF in an argument of the command line.
    with pytest.raises(FillMaskError, match="UTF-8"):
        fill_mask(model, tokenizer, "caf\udcff [MASK]")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "intermediate_size": 8}
    with pytest.raises(FillMaskError, match="only 100"):
        fill_mask(DebertaForMaskedLM(DebertaConfig(vocab_size=100, **sizes)), tokenizer, "[MASK]")


def test_outputs_that_are_no_numbers_are_no_guesses(model, tokenizer):
    with torch.no_grad():
        model.head.bias[7] = float("nan")
    with pytest.raises(FillMaskError, match="outputs are not finite numbers: its training has diverged"):
        fill_mask(model, tokenizer, "the [MASK] of")


# The tool, on every layout.


def test_a_text_longer_than_the_rows_of_the_training_is_filled_with_a_warning(model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(model, "learnt", Learnt(sequence_length=6))
    fill_mask(model, tokenizer, "[MASK]" * 4)
    assert not caplog.messages
    fill_mask(model, tokenizer, "[MASK]" * 5)
    assert "the text has 7 tokens, and the model was trained on rows of 6" in caplog.text


@pytest.fixture
def native(model, tokenizer, tmp_path) -> Path:
    """The model as a weights folder."""
    tokenizer.save(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "native", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "native"


def write_original_layout(folder: Path, model: DebertaForMaskedLM, tokenizer: Tokenizer) -> None:
    """A folder as the original release has it: pickled weights, model_config.json and a bare spm.model."""
    folder.mkdir()
    torch.save({to_microsoft(n): p.detach() for n, p in model.named_parameters()}, folder / "pytorch_model.bin")
    fields = to_huggingface_config(model.config)
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    (folder / "model_config.json").write_text(json.dumps(fields))
    (folder / "spm.model").write_bytes(tokenizer.spm_model)


def test_every_layout_of_a_checkpoint_gives_the_same_table(native, model, tokenizer, tmp_path, capsys):
    convert(native, tmp_path / "exported", Conversion(to="huggingface"))
    write_original_layout(tmp_path / "original", model, tokenizer)
    tables = []
    for layout in ("native", "exported", "original"):
        arguments = tool.parse_arguments([str(tmp_path / layout), "the [MASK] of [MASK]", "--top_k", "2"])
        assert run_tool(tool.run, arguments) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]
    lines = tables[0].splitlines()
    assert [line.split()[0] for line in lines] == ["the", "rank", "1", "2"] * 2
    guess = fill_mask(model, tokenizer, "the [MASK] of [MASK]")[0][0]
    assert all(part in lines[2] for part in (guess.piece, guess.text, f"{guess.probability:.2%}"))


def test_a_checkpoint_without_tokenizer_asks_for_one(model, native, tmp_path, capsys):
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="--tokenizer"):
        find_tokenizer(tmp_path / "bare")
    arguments = [str(tmp_path / "bare"), "the [MASK]"]
    assert run_tool(tool.run, tool.parse_arguments(arguments)) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert run_tool(tool.run, tool.parse_arguments([*arguments, "--tokenizer", str(tmp_path / "tokenizer")])) == 0


def test_another_tokenizer_than_the_checkpoints_own_is_refused(native, tmp_path, capsys):
    model = io.BytesIO()
    texts = (" ".join(topics[name].split())[:500] for name in sorted(topics))
    names = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=300, minloglevel=2, **names, **ids
    )
    Tokenizer(model.getvalue()).save(tmp_path / "other")
    arguments = tool.parse_arguments([str(native), "a [MASK]", "--tokenizer", str(tmp_path / "other")])
    assert run_tool(tool.run, arguments) == 2
    assert "not the checkpoint's own" in capsys.readouterr().err
    arguments = tool.parse_arguments([str(native), "a [MASK]", "--tokenizer", str(tmp_path / "tokenizer")])
    assert run_tool(tool.run, arguments) == 0


def test_the_tool_says_in_one_line_what_is_wrong(native, tmp_path, capsys):
    for arguments in ([str(native), "no mask here"], [str(tmp_path / "nowhere"), "a [MASK]"]):
        assert run_tool(tool.run, tool.parse_arguments(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
