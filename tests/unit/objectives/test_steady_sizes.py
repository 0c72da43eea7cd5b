"""Micro-batches whose labelled positions are filled up: in every objective the figures and gradients of those alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.objectives.choice import objective_type
from deberta_xl.objectives.micro_batch import MicroBatch
from deberta_xl.objectives.pretraining import Pretraining
from deberta_xl.settings.presets import load_run_config

LENGTH, MICRO = 40, 3
WORDS = [
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=24",
    f"model.sequence_length={LENGTH}", "model.max_position_embeddings=48", f"train.micro_batch_size={MICRO}",
    f"train.global_batch_size={2 * MICRO}", "evaluation.max_samples=6", "model.hidden_dropout=0.2",
]  # fmt: skip
OBJECTIVES = {name: [] for name in ("masked_lm", "causal", "prefix", "mixed", "replaced_tokens")}
OBJECTIVES["masked_lm"] = ["model.decoder_weights=own"]
"""Name of an objective -> settings; all have dropout."""


@pytest.fixture(scope="module")
def build(small_dataset) -> Callable[[str], Pretraining]:
    """An objective by its name."""

    def built(name: str) -> Pretraining:
        preset = "v3_debug" if name == "replaced_tokens" else "debug"
        config = load_run_config(preset, [*WORDS, *OBJECTIVES[name], f"train.objective={name}"])
        tokenizer = small_dataset.tokenizer
        data = PretrainingData(TokenStore(small_dataset.train), tokenizer, config.data, LENGTH, seed=1)
        architecture = config.model.architecture(tokenizer.vocab_size)
        return objective_type(name)(config, architecture, tokenizer, data, data)

    return built


def outcome(objective: Pretraining, batch: MicroBatch) -> tuple[dict[str, float], list[Tensor | None]]:
    """The figures of a micro-batch in training, and all gradients, in float64."""
    model = objective.build().double().train()
    shares = dict.fromkeys(objective.counts, 7.0)
    found = objective.losses(model, batch, shares, DropoutKey(3))
    found["loss"].backward()
    return {name: value.item() for name, value in found.items()}, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_figures_counts_and_gradients_are_those_of_the_labelled_positions_alone(build, name):
    objective = build(name)
    data, train = objective.source(objective.data), objective.config.train
    for filled, first in zip(next(objective.batches(1, 0, rank=0, size=1)), (0, MICRO), strict=True):
        plain = objective.micro_batch(data.batch(first, train.micro_batch_size))
        labelled = [batch.rows.labelled if name == "replaced_tokens" else batch.labelled for batch in (plain, filled)]
        assert len(labelled[0].label_L) < len(labelled[1].label_L)
        assert len(labelled[1].label_L) % 64 == 0
        assert labelled[1].position_BM.shape == (MICRO, 40 if labelled[0].position_BM.shape[1] > 32 else 32)
        assert filled.counts == plain.counts
        (figures, gradients), (expected, others) = outcome(objective, filled), outcome(objective, plain)
        assert figures == pytest.approx(expected, rel=1e-12)
        for own, other in zip(gradients, others, strict=True):
            # Products of other sizes sum in other orders.
            assert own is other is None or (own - other).norm() <= 1e-11 * other.norm() + 1e-15


def test_micro_batches_of_an_evaluation_have_one_size_too(build):
    objective = build("masked_lm")
    sizes = {(len(b.labelled.label_L), *b.labelled.position_BM.shape) for b in objective.held_out(rank=0, size=1)}
    assert sizes == {(64, MICRO, 32)}
