"""A user's own text is looked at: how it is divided, what its vocabulary needs, and what can be asked about it."""

import json
import random

import pytest
from invented_text import sample

from deberta_xl.base.errors import CorpusError
from deberta_xl.corpus.documents import is_held_out
from deberta_xl.corpus.reading import iterate_documents
from deberta_xl.corpus.text_form import look_at
from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.public.questions import ask, columns, questions, sentences


@pytest.mark.parametrize(
    ("language", "form", "documents"),
    [
        ("de", "blank lines", "blank_lines"),
        ("ja", "a line each", "lines"),
        ("ar", "a line each", "lines"),
        ("de", "novel", "parts"),
        ("ja", "novel", "parts"),
        ("ar", "one line", "parts"),
        ("dna", "one line", "parts"),
        pytest.param("dna", "fasta", "parts", marks=pytest.mark.full),
    ],
)
def test_a_text_of_any_form_and_script_is_divided_learnt_and_asked_about(tmp_path, language, form, documents):
    path = tmp_path / "own.txt"
    path.write_text(sample(language, form), encoding="utf-8")
    found = look_at([path])
    assert found.documents == documents
    texts = list(iterate_documents([path], documents=documents))
    held_out = [text for text in texts if is_held_out(text, found.valid_share)]
    assert 0 < len(held_out) < len(texts)
    assert sum(map(len, held_out)) >= 1000
    tokenizer = train_tokenizer(texts, found.vocab_size(4000), tmp_path / "tokenizer", allow_smaller=True)
    assert not any(tokenizer.unk_id in tokenizer.encode(text) for text in texts)
    asked = questions(held_out, tokenizer, 3)
    assert asked
    for question in asked:
        whole = question.text.replace("[MASK]", question.hidden)
        assert any(whole in " ".join(text.split()) for text in held_out)
        assert columns(whole) <= 66
        assert question.hidden.isalpha()


def test_a_record_of_json_is_looked_at_by_its_key(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"body": sample("de", "novel")}))
    assert look_at([path], "body").documents == "parts"
    with pytest.raises(CorpusError, match="no key 'text'"):
        look_at([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Zu kurz.\n" * 20, "180 characters|179 characters"),
        ("", "there is none"),
        ("über\n".encode("latin-1") * 9000, "iconv -f ISO-8859-1"),
    ],
)
def test_a_text_from_which_nothing_can_be_learnt_is_refused_with_what_is_needed(tmp_path, content, message):
    (tmp_path / "own.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError, match=message):
        look_at([tmp_path / "own.txt"])


def test_a_text_of_many_characters_gets_a_larger_vocabulary_and_bytes(tmp_path):
    rng, characters = random.Random(2), [chr(0x4E00 + n) for n in range(4000)]
    (tmp_path / "own.txt").write_text("。\n".join("".join(rng.sample(characters, 100)) for _ in range(400)))
    found = look_at([tmp_path / "own.txt"])
    assert found.needs_bytes
    assert found.vocab_size(4000) == 9000
    assert found._replace(different_characters=90).vocab_size(4000) == 4000


def test_questions_are_whole_words_in_sentences_that_a_shell_and_a_terminal_can_take(tokenizer, texts):
    found = questions(texts, tokenizer, 5)
    assert len(found) == 5
    asked = ask("Kalo mine ka pura.", tokenizer)
    assert (asked.text, asked.hidden) == ("Kalo [MASK] ka pura.", "mine")
    joined = ask("Kalo mi\u200cne, ka pura mine\u200f.", tokenizer)
    assert joined.text.replace("[MASK]", joined.hidden) == "Kalo mi\u200cne, ka pura mine\u200f."
    assert ask("Kalo mine \u202eka pura.", tokenizer) is None
    assert ask("-kalo mine pura", tokenizer) is None
    assert ask("kalo [MASK] pura", tokenizer) is None
    assert ask("1 2 3 4", tokenizer) is None
    assert list(sentences("Kurz. Dies ist ein Satz, der passt. Und")) == ["Dies ist ein Satz, der passt."]
