"""The perplexity of tools/evaluate.py against a count of one's own, over ranks, and its warnings."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_dataset import SmallDataset, documents

from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.pretraining import DataSection
from deberta_xl.weights.native import write_weights
from deberta_xl.weights.native_config import Learnt, native_config

TOOLS = Path(__file__).parents[3] / "tools"
LENGTH = 40


def folder_of(model: MaskedLanguageModel, folder: Path, dataset: SmallDataset, *learnt: str | int | None) -> Path:
    """The model as a weights folder."""
    tokenizer = folder.parent / "tokenizer"
    dataset.tokenizer.save(tokenizer)
    write_weights(
        folder, dict(model.named_parameters()), native_config(model.config, learnt=Learnt(*learnt)), tokenizer
    )
    return folder


@pytest.fixture(scope="module")
def model(small_dataset) -> MaskedLanguageModel:
    """Fresh, with logits that are spread enough to differ from a guess."""
    config = DebertaConfig(
        vocab_size=small_dataset.tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
        position_buckets=8, max_position_embeddings=LENGTH, conv_kernel_size=3, initializer_range=0.3,
    )  # fmt: skip
    return MaskedLanguageModel(config, seed=1).eval()


def evaluate(folder: Path, data: Path, *options: str) -> None:
    """The tool, as it is started."""
    start("evaluate.py", folder, data, *options)


def start(tool: str, *arguments: object) -> None:
    """A tool, in this process."""
    sys.argv = [str(TOOLS / tool), *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def known(small_dataset, tmp_path_factory) -> tuple[Path, list[str]]:
    """A dataset whose tokenizer knows all of its texts, and those as it normalises them."""
    tokenizer, prefix = small_dataset.tokenizer, tmp_path_factory.mktemp("known") / "valid"
    texts = [text for text in documents()[-150:] if tokenizer.unk_id not in tokenizer.encode(text)][:40]
    with TokenStoreWriter(prefix, tokenizer=tokenizer) as writer:
        for text in texts:
            writer.add(tokenizer.encode(text))
        writer.finish()
    return prefix, [tokenizer.processor.normalize(text).replace("▁", " ").strip() for text in texts]


def by_hand(model: MaskedLanguageModel, prefix: Path, tokenizer: Tokenizer) -> tuple[float, int]:
    """Sum and number of −ln p over every token but the first of each piece of a document, from a forward for each."""
    data = PretrainingData(TokenStore(prefix), tokenizer, DataSection(), LENGTH, seed=1)
    total, number = 0.0, 0
    for start in range(data.num_rows):
        ids, segments, labels = (torch.from_numpy(part[0]) for part in data.batch(start, 1))
        row, last = torch.where(labels > 0, labels, ids), int((segments > 0).sum()) - 1
        for document in range(1, int(segments.max()) + 1):
            places = (segments == document).nonzero().flatten()
            piece = row[places][None]
            logits = model(piece, open_BS=torch.zeros_like(piece, dtype=torch.bool)).logits[0].log_softmax(-1)
            for number_in_piece in range(1, len(places)):
                if places[number_in_piece] < last:  # what closes the row is predicted from nothing
                    total -= float(logits[number_in_piece - 1, piece[0, number_in_piece]])
                    number += 1
    return total, number


@torch.no_grad()
def test_perplexity_is_that_of_every_next_token_by_token_word_and_byte(small_dataset, known, model, tmp_path, capfd):
    folder = folder_of(model, tmp_path / "writer", small_dataset, "causal")
    prefix, texts = known
    evaluate(folder, prefix)
    out = capfd.readouterr()
    found = json.loads(out.out.splitlines()[-1])
    total, number = by_hand(model, prefix, small_dataset.tokenizer)
    assert found["num_labels"] == number
    assert found["loss"] == pytest.approx(total / number, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / number), rel=1e-4)
    assert found["num_words"] == sum(len(text.split()) for text in texts)
    assert found["num_bytes"] == sum(len(text.encode()) + 1 for text in texts)
    assert found["word_perplexity"] == pytest.approx(math.exp(min(700, total / found["num_words"])), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / found["num_bytes"] / math.log(2), rel=1e-5)
    assert "never trained" not in out.err


def test_ranks_agree_and_a_model_that_only_fills_masks_is_measured_with_a_warning(
    small_dataset, model, tmp_path, capfd
):
    folder = folder_of(model, tmp_path / "filler", small_dataset)
    options = ("--metric", "perplexity", "--max_samples", "61", "--micro_batch_tokens", "400")
    results = []
    for ranks in (1, 2):
        run_ranks(evaluate, ranks, folder, small_dataset.valid, *options, backend=None)
        out = capfd.readouterr()
        text = out.out + out.err
        results.append(json.loads(next(line for line in text.splitlines() if line.startswith("{"))))
        assert results[-1]["word_perplexity"] is None
        assert "per word and byte: not known, since the text of" in text
        assert text.count("was never trained to predict the next token (train.objective=masked_lm)") == 1
    one, two = ({name: value for name, value in found.items() if value is not None} for found in results)
    assert one == pytest.approx(two, rel=1e-6)


def test_rows_are_as_long_as_in_training_and_longer_ones_are_measured_with_a_warning(
    small_dataset, model, tmp_path, capfd
):
    folder = folder_of(model, tmp_path / "short", small_dataset, "causal", None, 24)
    options = ("--max_samples", "4")
    says = "was trained on rows of 24 tokens: of the positions behind those"
    for length, more in ((24, ()), (16, ("--sequence_length", "16")), (32, ("--sequence_length", "32"))):
        evaluate(folder, small_dataset.valid, *options, *more)
        out = capfd.readouterr()
        assert f"rows of {length} tokens, " in out.out
        assert (says in out.out + out.err) == (length == 32)


def test_masks_of_a_model_that_only_writes_are_filled_with_a_warning(small_dataset, model, tmp_path, capfd):
    folder = folder_of(model, tmp_path / "writer", small_dataset, "prefix")
    evaluate(folder, small_dataset.valid, "--metric", "masked_lm", "--max_samples", "4")
    out = capfd.readouterr()
    assert "was never trained to fill masks (train.objective=prefix)" in out.out + out.err
    start("fill_mask.py", folder, "a [MASK] text")
    out = capfd.readouterr()
    assert "was never trained to fill masks (train.objective=prefix)" in out.out + out.err
    mixed = folder_of(model, tmp_path / "mixed", small_dataset, "mixed", "causal")
    start("fill_mask.py", mixed, "a [MASK] text")
    for metric in ("masked_lm", "perplexity"):
        evaluate(mixed, small_dataset.valid, "--metric", metric, "--max_samples", "4")
        assert "never trained" not in "".join(capfd.readouterr())
