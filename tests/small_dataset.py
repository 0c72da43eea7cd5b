"""A small real dataset made from text that comes with Python, shared by the tests of several folders."""

from __future__ import annotations

import io
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest
import sentencepiece

from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.tokenizer import Tokenizer

PIECES = 500
SPECIALS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
NAMES = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}


class SmallDataset(NamedTuple):
    """Prefixes of a training and a held-out dataset, and their tokenizer."""

    train: Path
    valid: Path
    tokenizer: Tokenizer


def documents() -> list[str]:
    """Paragraphs of Python's language reference, in a stable order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return [" ".join(block.split()) for block in text.split("\n\n") if len(block) > 80][:1500]


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    """About 100,000 tokens, vocabulary 504."""
    folder = tmp_path_factory.mktemp("dataset")
    texts, model = documents(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=PIECES, minloglevel=2, **SPECIALS, **NAMES
    )
    tokenizer = Tokenizer(model.getvalue(), PIECES + 4)
    parts = {"train": texts[:-150], "valid": texts[-150:]}
    for name, part in parts.items():
        with TokenStoreWriter(folder / name, tokenizer=tokenizer) as writer:
            for text in part:
                writer.add(tokenizer.encode(text))
            writer.finish()
    return SmallDataset(folder / "train", folder / "valid", tokenizer)
