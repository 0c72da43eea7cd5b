"""A tiny tokenizer and text made of it, shared by the tests of the data path."""

import random

import pytest
from small_stores import make_documents, write

from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.data.tokenizer import Tokenizer

SYLLABLES = ["ka", "lo", "mi", "ne", "pu", "ra", "si", "to", "ve", "xu", "dan", "fer", "gol", "hin", "jas"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Reproducible sentences of invented words of one to four syllables, with punctuation."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=rng.randint(3, 60))).capitalize() + rng.choice(".!?") for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300)


@pytest.fixture(scope="session")
def tokenizer_folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(texts, 208, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def prefix(tmp_path):
    """A dataset of `make_documents()`."""
    write(tmp_path / "data", make_documents())
    return tmp_path / "data"
