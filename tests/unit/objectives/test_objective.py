"""What every objective has without saying it: the evaluation of its figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
    assert second.counts == again.counts == (len(second.labelled.label_L),)
