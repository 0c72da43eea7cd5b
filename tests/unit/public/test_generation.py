"""Writing on: a model that has learnt a text repeats it; batches, prompts that are no good, and the tool."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from small_pair import write_pair

from deberta_xl.base.command_line import run_tool
from deberta_xl.base.errors import ConfigError
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.generation import Writing, Written, generate
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.prompts import GenerationError, Speller, read_prompt
from deberta_xl.public.room import Room
from deberta_xl.public.sampling import Sampling
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import Learnt
from tools import generate as tool

TEXT = "The value of an assignment is the object itself."
POSITIONS = 40


@pytest.fixture(scope="module")
def tokenizer(small_dataset) -> Tokenizer:
    return small_dataset.tokenizer


@pytest.fixture(scope="module")
def model(tokenizer) -> DebertaForMaskedLM:
    """A causal model that knows one text by heart."""
    config = DebertaConfig(
        vocab_size=tokenizer.vocab_size + 3, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
        max_position_embeddings=POSITIONS, position_buckets=8, conv_kernel_size=3,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = DebertaForMaskedLM(config)
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(TEXT), tokenizer.sep_id]])
    labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(ids, labels=labels, open_BS=torch.zeros_like(ids, dtype=torch.bool)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    model.learnt = Learnt("causal")
    return model.eval()


def written(model, tokenizer, prompts, **options) -> list[Written]:
    return list(generate(model, tokenizer, prompts, Writing(**options)))


@torch.no_grad()
def greedily_anew(model: DebertaForMaskedLM, tokenizer: Tokenizer, prompt: str, limit: int) -> list[int]:
    """The most probable ordinary tokens, every one of them from a whole forward pass."""
    ids = [tokenizer.cls_id, *tokenizer.encode(prompt).tolist()]
    forbidden = [*range(2), 3, *range(tokenizer.num_pieces, model.config.vocab_size)]
    found = []
    while len(found) < limit and len(ids) < POSITIONS:
        logits = model(torch.tensor([ids]), open_BS=torch.zeros(1, len(ids), dtype=torch.bool)).logits[0, -1]
        logits[forbidden] = -torch.inf
        token = int(logits.argmax())
        if token == tokenizer.sep_id:
            break
        found, ids = [*found, token], [*ids, token]
    return found


# What is written.


def test_a_text_known_by_heart_is_repeated_to_its_end(model, tokenizer):
    for prompt in ("The value", "The value of an"):
        (found,) = written(model, tokenizer, [prompt])
        assert (found.text, found.stopped) == (TEXT, "end")
        assert found.token_ids == tokenizer.encode(TEXT).tolist()[len(tokenizer.encode(prompt)) :]


def test_prompts_of_different_lengths_are_continued_as_each_alone_and_as_without_anything_kept(model, tokenizer):
    prompts = ["The value of an", "object", "a a a a a a a a a a a a a", "The", "is the value of"]
    together = written(model, tokenizer, prompts, max_new_tokens=20, batch_size=3)
    for prompt, found in zip(prompts, together, strict=True):
        assert [found] == written(model, tokenizer, [prompt], max_new_tokens=20)
        assert found.token_ids == greedily_anew(model, tokenizer, prompt, 20)


def test_drawn_texts_do_not_depend_on_the_batch_but_on_seed_and_number(model, tokenizer):
    prompts = ["The value", "object is", "The value", "a"]
    hot = Sampling(temperature=2.0, top_p=0.95, seed=4)
    one, two = (written(model, tokenizer, prompts, sampling=hot, batch_size=size) for size in (1, 3))
    assert one == two
    assert one[0].token_ids != one[2].token_ids
    other = written(model, tokenizer, prompts, sampling=Sampling(temperature=2.0, top_p=0.95, seed=5))
    assert [found.token_ids for found in other] != [found.token_ids for found in one]


def test_no_special_or_spare_token_is_written(model, tokenizer):
    hot = Sampling(temperature=50.0)
    ids = {
        i for found in written(model, tokenizer, ["a"] * 40, sampling=hot, max_new_tokens=30) for i in found.token_ids
    }
    assert len(ids) > 300
    assert all(3 < token < tokenizer.num_pieces for token in ids)


def test_a_text_stops_where_it_ends_where_it_is_told_and_where_positions_do(model, tokenizer):
    hot = Sampling(temperature=50.0, seed=2)
    assert written(model, tokenizer, ["The value"])[0].stopped == "end"
    found = written(model, tokenizer, ["The value"], max_new_tokens=3)[0]
    assert (found.stopped, len(found.token_ids)) == ("max_new_tokens", 3)
    prompt = "a " * (POSITIONS - 6)
    found = written(model, tokenizer, [prompt], max_new_tokens=99, sampling=hot)[0]
    assert (found.stopped, len(found.token_ids)) == ("position_table", POSITIONS - 1 - len(tokenizer.encode(prompt)))


@pytest.fixture
def short_sighted(model, monkeypatch) -> DebertaForMaskedLM:
    """The model, as if it had been trained on rows shorter than its position table."""
    monkeypatch.setattr(model, "learnt", Learnt("causal", sequence_length=12))
    return model


def test_a_text_stops_where_the_rows_of_the_training_did_unless_more_is_asked_for(short_sighted, tokenizer):
    hot = {"max_new_tokens": 99, "sampling": Sampling(temperature=50.0, seed=2)}
    room = {None: (12, "trained_length"), 5: (5, "max_length"), 30: (30, "max_length")}
    for asked, (length, stopped) in room.items():
        found = written(short_sighted, tokenizer, ["a a", "a a a"], max_length=asked, **hot)
        assert [(len(text.token_ids), text.stopped) for text in found] == [(length - n, stopped) for n in (3, 4)]
    assert written(short_sighted, tokenizer, ["a a"], max_length=30, **hot)[0].token_ids[:9] == (
        written(short_sighted, tokenizer, ["a a"], **hot)[0].token_ids
    )
    assert written(short_sighted, tokenizer, ["a a"], max_length=30, max_new_tokens=2)[0].stopped == "max_new_tokens"


def test_more_room_than_there_is_is_refused_and_so_is_a_prompt_without_any(short_sighted, tokenizer):
    with pytest.raises(ConfigError, match="max_length=41 is more than the 40 positions of the model"):
        written(short_sighted, tokenizer, ["a"], max_length=41)
    words = "the 12 tokens of a row in the model's training; shorten it to 10 tokens; max_length allows more, which it"
    with pytest.raises(GenerationError, match=words):
        written(short_sighted, tokenizer, ["a " * 11])
    with pytest.raises(GenerationError, match=r"the 20 tokens of max_length; shorten it to 18 tokens$"):
        written(short_sighted, tokenizer, ["a " * 19], max_length=20)


def test_a_prefix_model_sees_the_prompt_in_both_directions(model, tokenizer):
    fresh = DebertaForMaskedLM(model.config, seed=1).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    prompts = ["itself object the is value of", "The"]
    causal = written(fresh, tokenizer, prompts, max_new_tokens=9)
    fresh.learnt = Learnt("mixed", "prefix")
    prefix = written(fresh, tokenizer, prompts, max_new_tokens=9)
    with torch.no_grad():
        logits = fresh(torch.tensor([[tokenizer.cls_id, *tokenizer.encode(prompts[0]).tolist()]])).logits[0, -1]
    assert prefix[0].token_ids[0] == logits[4 : tokenizer.num_pieces].argmax() + 4
    assert prefix[0] != causal[0]


def test_a_character_of_several_bytes_appears_whole():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 20), model_writer=model, vocab_size=270, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue())
    for text in ("漢字 a ü", "a b", "नमस्ते", "<0x41>"):
        speller = Speller(tokenizer)
        pieces = [*map(speller.spell, tokenizer.encode(text).tolist()), speller.end()]
        assert "".join(pieces).strip() == text
        assert not any("\ufffd" in piece for piece in pieces)
    speller = Speller(tokenizer)
    half = tokenizer.encode("漢").tolist()[:-1]
    assert "".join(map(speller.spell, [*half, *tokenizer.encode("a").tolist()])).strip() == "\ufffd a"


# Prompts and settings that are no good.


def test_spaces_at_the_end_of_a_prompt_give_way_to_the_next_words_own(tokenizer):
    room = Room(40, "position_table")
    assert read_prompt("The value \n", 0, tokenizer, room) == read_prompt("The value", 0, tokenizer, room)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["The", ""], "prompt 2 is empty"),
        ([" \t"], "prompt 1 is empty"),
        (
            ["a " * 60],
            "prompt 1 has 60 tokens;.*do not fit into the 40 positions of the model; shorten it to 38 tokens",
        ),
        (["caf\udcff"], "prompt 1 is not UTF-8"),
    ],
    ids=["empty", "blank", "long", "bytes"],
)
def test_a_prompt_that_cannot_be_continued_is_named(model, tokenizer, prompts, words):
    with pytest.raises(GenerationError, match=words):
        written(model, tokenizer, prompts)


def test_the_longest_prompt_has_room_for_one_token(model, tokenizer):
    prompt = "a " * (POSITIONS - 2)
    (found,) = written(model, tokenizer, [prompt], sampling=Sampling(temperature=50.0))
    assert len(found.token_ids) == 1


def test_more_tokens_to_draw_from_than_there_are_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="top_k=498 is more than there is to draw from: the tokenizer's 497 tokens"):
        written(model, tokenizer, ["The"], sampling=Sampling(top_k=498))


@pytest.mark.parametrize(("option", "value"), [("max_new_tokens", 0), ("batch_size", 0), ("max_length", 2)])
def test_no_room_is_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option}={value} is too small"):
        Writing(**{option: value})


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "intermediate_size": 8}
    with pytest.raises(GenerationError, match="only 100"):
        written(DebertaForMaskedLM(DebertaConfig(vocab_size=100, **sizes)), tokenizer, ["The"])


def test_outputs_that_are_no_numbers_are_no_text(tokenizer):
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "intermediate_size": 8}
    model = DebertaForMaskedLM(DebertaConfig(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    with torch.no_grad():
        model.head.bias[7] = float("nan")
    with pytest.raises(GenerationError, match="outputs are not finite numbers: its training has diverged"):
        written(model, tokenizer, ["The"])


# The tool.


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    """The model as a weights folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(folder / "tokenizer")
    model.save_pretrained(folder / "native", tokenizer=folder / "tokenizer")
    return folder / "native"


@pytest.fixture
def call(capsys):
    """The tool as a command: exit status, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = run_tool(tool.run, tool.parse_arguments(list(map(str, arguments))))
        return status, *capsys.readouterr()

    return call


def test_the_tool_writes_a_text_for_each_prompt(call, folder):
    assert call(folder, "The value", "The value of an") == (0, f"{TEXT}\n{TEXT}\n", "")


def test_the_tool_writes_lines_of_json(call, folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The value", "id": "x"}\n\n{"text": "The value of"}\n')
    status, out, _ = call(folder, "--prompts", tmp_path / "prompts.jsonl", "--json", "--max_new_tokens", 2)
    first, second = map(json.loads, out.splitlines())
    assert status == 0
    assert first == {
        "id": "x", "prompt": "The value", "continuation": " of an", "text": "The value of an", "tokens": 2,
        "stopped": "max_new_tokens",
    }  # fmt: skip
    assert (second["id"], second["stopped"]) == (1, "max_new_tokens")


def test_the_tool_reads_lines_of_a_file_and_passes_over_blank_ones(call, folder, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfThe value\r\n\n  \nThe value of\n")
    assert call(folder, "--prompts", tmp_path / "prompts.txt") == (0, f"{TEXT}\n{TEXT}\n", "")


def test_a_single_text_appears_on_a_terminal_as_it_is_written(call, folder, monkeypatch):
    shown = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (shown.append(text), write(text))[1])
    assert call(folder, "The value ")[:2] == (0, f"{TEXT}\n")
    assert len([piece for piece in shown if piece]) > 10


def test_the_tool_says_when_positions_are_used_up(call, folder):
    _, _, error = call(folder, "a " * 30, "The value", "--temperature", 50)
    assert error == "2 of 2 texts filled the 40 positions of the model, and stopped there\n"


def test_the_tool_says_where_the_training_ended_and_goes_on_behind_that_when_asked_to(
    call, short_sighted, folder, tmp_path
):
    short_sighted.save_pretrained(tmp_path / "short", tokenizer=folder.parent / "tokenizer")
    drawn = (tmp_path / "short", "a a", "--temperature", 50, "--json")
    status, out, error = call(*drawn)
    assert (status, json.loads(out)["stopped"], json.loads(out)["tokens"]) == (0, "trained_length", 9)
    assert error == (
        "1 of 1 text filled the 12 tokens of a row in the model's training, and stopped there; max_length allows more, "
        "which it has never seen\n"
    )
    status, out, error = call(*drawn, "--max_length", 20)
    assert (status, json.loads(out)["stopped"], json.loads(out)["tokens"], error) == (0, "max_length", 17, "")


def test_the_tool_warns_of_a_model_never_trained_to_write_and_of_unknown_characters(call, model, folder, tmp_path):
    untrained = DebertaForMaskedLM(model.config).eval()
    untrained.save_pretrained(tmp_path / "untrained", tokenizer=folder.parent / "tokenizer")
    status, out, error = call(tmp_path / "untrained", "The 漢 ü", "--max_new_tokens", 3)
    assert status == 0
    assert out.startswith("The 漢 ü")
    warnings = error.splitlines()
    assert warnings[0].startswith(f"warning: {tmp_path / 'untrained'} has not been trained to write on")
    assert warnings[1].endswith("in prompt 1: ü 漢")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["The", "--top_p", 2], "top_p=2.0 must lie above 0"),
        (["The", "--temperature", 0], "temperature=0.0 must be above 0"),
        (["The", "--seed", 3], "--seed 3 draws nothing"),
        (["The", "--prompts", "x.txt"], "on the command line and in --prompts"),
        (["The", "--max_new_tokens", 0], "max_new_tokens=0 is too small"),
        ([""], "prompt 1 is empty"),
    ],
    ids=str,
)
def test_the_tool_says_in_one_line_what_is_wrong(call, folder, arguments, words):
    status, out, error = call(folder, *arguments)
    assert (status, out) == (2, "")
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_discriminator_is_refused_with_what_it_can_do_instead(call, folder, tmp_path):
    write_pair(tmp_path / "v3")
    status, out, error = call(tmp_path / "v3", "The", "--tokenizer", folder.parent / "tokenizer")
    assert (status, out) == (2, "")
    assert "is a discriminator, which fills no masks and writes no text: it finds replaced tokens" in error


def test_a_file_without_prompts_or_with_a_record_without_text_is_refused(call, folder, tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n{"words": 3}\n')
    assert "has no prompts; write one on each line" in call(folder, "--prompts", tmp_path / "none.txt")[2]
    assert "other.jsonl:2: there is no text" in call(folder, "--prompts", tmp_path / "other.jsonl")[2]


def test_a_checkpoint_without_tokenizer_asks_for_one(call, model, folder, tmp_path):
    model.save_pretrained(tmp_path / "bare")
    assert "--tokenizer" in call(tmp_path / "bare", "The value")[2]
    assert call(tmp_path / "bare", "The value", "--tokenizer", folder.parent / "tokenizer") == (0, f"{TEXT}\n", "")
