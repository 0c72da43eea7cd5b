"""What every objective has without saying it: the evaluation of its figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deberta_xl.data import loader
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.masked_lm import MaskedLM
from deberta_xl.objectives.objective import Objective
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.pretraining import (
    DataSection,
    EvaluationSection,
    ModelSection,
    PretrainingTrainSection,
    RunConfig,
)

GIVEN = ("architecture", "tokenizer", "data", "valid")
"""What an objective is made of, besides its configuration."""


@pytest.fixture(scope="module")
def objective(small_dataset) -> MaskedLM:
    """Masked language modelling in three micro-batches, the last of which is half empty."""
    tokenizer = small_dataset.tokenizer
    config = RunConfig(
        model=ModelSection(sequence_length=40, max_position_embeddings=48, position_buckets=8),
        train=PretrainingTrainSection(global_batch_size=4, micro_batch_size=4),
        evaluation=EvaluationSection(max_samples=10),
    )
    architecture = DebertaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32,
        position_buckets=8, max_position_embeddings=48,
    )  # fmt: skip
    data = PretrainingData(TokenStore(small_dataset.valid), tokenizer, DataSection(), 40, seed=1)
    return MaskedLM(config, architecture, tokenizer, data, data)


def test_an_evaluation_gives_the_figures_of_losses_over_all_that_is_held_out(objective):
    run = Evaluator(model=objective.build().eval(), device=torch.device("cpu"))
    found, expected = Objective.evaluate(objective, run), objective.evaluate(run)
    assert found.values == pytest.approx({name: expected.values[name] for name in ("loss", "accuracy")}, rel=1e-6)
    assert found.line == f"validation loss {found.values['loss']:.4f}  validation accuracy {0:.4f}"
    assert set(expected.pictures) == {"confusion"}
    silent = objective.evaluate(replace(run, is_first=False))
    assert (silent.line, silent.pictures, silent.values["unigram_entropy"]) == ("", {}, None)


def test_batches_are_a_function_of_the_sample_they_begin_with(objective):
    steps = objective.batches(1, 0, rank=0, size=1)
    next(steps)
    (second,), (again,) = next(steps), next(objective.batches(2, 4, rank=0, size=1))
    assert torch.equal(second.input_ids_BS, again.input_ids_BS)
    assert second.counts == again.counts == (second.labelled.num_labels,)


def test_rows_grow_longer_and_a_step_has_as_many_tokens_as_ever(objective):
    train = replace(objective.config.train, steps=5, lengths="10:0.4,20:0.2", global_batch_size=8, micro_batch_size=2)
    growing = MaskedLM(replace(objective.config, train=train), *(getattr(objective, name) for name in GIVEN))
    steps = [next(batches) for batches in [growing.batches(1, 0, rank=0, size=1)] for _ in range(7)]
    shapes = [[tuple(batch.input_ids_BS.shape) for batch in step] for step in steps]
    assert shapes == [[(8, 10)] * 4] * 2 + [[(4, 20)] * 4] + [[(2, 40)] * 4] * 4
    for number, step in enumerate(steps):
        for size in (1, 2):  # begun anew at this step, on other numbers of ranks
            ranks = [next(growing.batches(number + 1, 8 * number, rank=rank, size=size)) for rank in range(size)]
            again = [batch for turn in zip(*ranks, strict=True) for batch in turn]
            assert all(torch.equal(a.input_ids_BS, b.input_ids_BS) for a, b in zip(step, again, strict=True))
    assert [growing.learnt(step).sequence_length for step in (2, 3, 4)] == [10, 20, 40]
    # Each length stands where it would stand if all steps before had been its own.
    rows = growing.data.in_rows_of(20).batch(2 * 8 * 2, 4).input_ids
    assert torch.equal(steps[2][0].input_ids_BS, torch.from_numpy(rows))


def test_the_share_of_tokens_in_long_documents_is_counted_in_whatever_pieces(objective, monkeypatch):
    lengths = objective.data.store.lengths
    fits = int(np.median(lengths))
    expected = lengths[lengths > fits].sum() / lengths.sum()
    assert 0 < objective.data.share_in_longer_documents(fits + 2) == expected < 1
    monkeypatch.setattr(loader, "CHECKED_DOCUMENTS", 7)
    assert objective.data.share_in_longer_documents(fits + 2) == expected
