"""Evaluation over any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deberta_xl.base.errors import ConfigError, TokenStoreError
from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.masked_evaluation import evaluate_masked_lm, evaluation_batches
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.pretraining import DataSection
from tools.evaluate import check_finite

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(small_dataset) -> PretrainingData:
    """The held-out rows."""
    return PretrainingData(TokenStore(small_dataset.valid), small_dataset.tokenizer, DataSection(), 64, seed=1)


def build_model(vocab_size: int) -> MaskedLanguageModel:
    """A small model with fresh weights."""
    config = DebertaConfig(
        vocab_size=vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=8,
        max_position_embeddings=64,
    )  # fmt: skip
    return MaskedLanguageModel(config).eval()


@pytest.mark.parametrize(("max_samples", "micro", "size"), [(0, 8, 1), (10, 4, 2), (10, 3, 3), (5, 8, 4)])
def test_ranks_cover_every_row_once_in_equally_many_batches(data, max_samples, micro, size):
    options = {"max_samples": max_samples, "micro_batch_size": micro}
    per_rank = [list(evaluation_batches(data, rank=rank, size=size, **options)) for rank in range(size)]
    assert len({len(batches) for batches in per_rank}) == 1
    expected = data.held_out_batch(0, max_samples or data.num_rows)
    seen = [row for batches in per_rank for batch in batches for row in batch.input_ids_BS if row.any()]
    assert sorted(map(bytes, map(torch.Tensor.numpy, seen))) == sorted(map(bytes, expected.input_ids))
    labels = sum(batch.counts[0] for batches in per_rank for batch in batches)
    assert labels == (expected.labels > 0).sum()


def test_an_untrained_model_is_as_good_as_guessing(data):
    vocab_size = data.tokenizer.vocab_size
    options = {"vocab_size": vocab_size, "max_samples": 12, "micro_batch_size": 5}
    options["log_unigram"] = data.log_unigram
    result = evaluate_masked_lm(Evaluator(model=build_model(vocab_size), device=CPU), data, **options)
    # Fresh logits have a spread of about 0.1.
    assert result.loss == pytest.approx(math.log(vocab_size), abs=0.05)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.num_labels == len(result.label_L) == len(result.guess_L)
    assert result.accuracy == (result.label_L == result.guess_L).double().mean().item()
    expected = -data.log_unigram[result.label_L.numpy()].mean()
    assert result.unigram_entropy == pytest.approx(expected)
    assert 3 < expected < math.log(vocab_size)
    assert (
        result[:4] == evaluate_masked_lm(Evaluator(model=build_model(vocab_size), device=CPU), data, **options)[:4]
    ), "masks are fixed"


def test_a_text_too_short_to_be_masked_has_no_loss_rather_than_a_perfect_one(small_dataset, tmp_path):
    tokenizer = small_dataset.tokenizer
    with TokenStoreWriter(tmp_path / "short", tokenizer=tokenizer) as writer:
        writer.add(tokenizer.encode("a")[:1])
        writer.finish()
    data = PretrainingData(TokenStore(tmp_path / "short"), tokenizer, DataSection(mask_probability=0.01), 64, seed=1)
    options = {"vocab_size": tokenizer.vocab_size, "max_samples": 0}
    result = evaluate_masked_lm(
        Evaluator(model=build_model(tokenizer.vocab_size), device=CPU), data, micro_batch_size=4, **options
    )
    assert result.num_labels == 0
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
    with pytest.raises(TokenStoreError, match=r"short cannot be evaluated: no token of its 1 rows \(1 tokens in all\)"):
        data.check_held_out(0)
    data.check_training()  # another epoch may choose it


def test_the_batch_size_does_not_matter(data):
    options = {"vocab_size": data.tokenizer.vocab_size, "max_samples": 12}
    model = build_model(data.tokenizer.vocab_size)
    one, many = (
        evaluate_masked_lm(Evaluator(model=model, device=CPU), data, micro_batch_size=micro, **options)
        for micro in (1, 12)
    )
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.num_labels == many.num_labels


def test_a_loss_that_is_no_number_is_an_error_of_the_tool(data):
    model = build_model(data.tokenizer.vocab_size)
    with torch.no_grad():
        model.head.bias[5] = math.nan
    options = {"vocab_size": data.tokenizer.vocab_size, "max_samples": 4, "micro_batch_size": 4}
    result = evaluate_masked_lm(Evaluator(model=model, device=CPU), data, **options)
    assert math.isnan(result.perplexity)
    with pytest.raises(ConfigError, match="the loss of runs/first is nan: its training has diverged"):
        check_finite(Path("runs/first"), result)
