"""The original's replaced token detection, divided over tensor-parallel ranks and held by every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import Case, Layout, engine_settings
from pair_vectors import Outcome, PairVector
from ranks import run_ranks
from torch import Tensor
from vectors import vector_folders

from deberta_xl.checkpoint.fragments import (
    canonical_parameters,
    create_adam_state,
    engine_fragments,
    fragment_values,
)
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.shard import shard_of
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.engine import build_engine

TOLERANCE = 1e-5
"""Of losses and logits, and of the norm of each gradient: float32."""
FOLDERS = vector_folders("rtd")


def check_gradient(name: str, actual: Tensor, expected: Tensor) -> None:
    """A gradient, or the part of it that is here, against the original's."""
    assert (actual - expected).norm() <= TOLERANCE * max(1.0, float(expected.norm())), name


def divided(folder: Path, is_sliced: bool) -> Outcome:
    """On each of two tensor-parallel ranks."""
    groups = Layout(tensor=2).join()
    vector = PairVector(folder, torch.float32)
    divide(vector.model, groups, sequence_parallel=is_sliced)
    outcome = vector.outcome(vector.model)
    outcome.total.backward()
    for name, parameter in vector.model.named_parameters():
        shard, expected = shard_of(parameter), vector.gradients[name]
        check_gradient(name, parameter.grad, expected if shard is None else shard.cut(expected))
    return Outcome(*(value.detach() for value in outcome))


def engined(folder: Path, stage: int) -> Outcome:
    """On each of two data-parallel ranks; at a rate of 0, Adam's first moment keeps a tenth of the gradient."""
    vector = PairVector(folder, torch.float32)
    groups = Layout(data=2).join()
    settings = engine_settings(Case(stage)) | {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4}
    settings |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    engine = build_engine(vector.model, OptimizerSection(learning_rate=0.0, beta1=0.9), settings, groups)
    engine.eval()
    outcome = vector.outcome(engine)
    engine.backward(outcome.total)
    engine.step()
    create_adam_state(engine)
    fragments = engine_fragments(engine, canonical_parameters(engine))
    for piece, values in fragment_values(engine, fragments, "exp_avg"):
        expected = vector.gradients[piece.name].flatten()[piece.offset : piece.offset + piece.numel]
        check_gradient(piece.name, values * 10, expected)
    return Outcome(*(value.detach() for value in outcome))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize(
    "is_sliced", [pytest.param(False, marks=pytest.mark.full, id="TP2"), pytest.param(True, id="TP2 sliced")]
)
def test_a_divided_pair_computes_what_the_original_computes(folder, is_sliced):
    for outcome in run_ranks(divided, 2, folder, is_sliced):
        PairVector(folder).check(outcome, TOLERANCE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full), 3])
def test_every_stage_computes_what_the_original_computes(folder, stage):
    for outcome in run_ranks(engined, 2, folder, stage):
        PairVector(folder).check(outcome, TOLERANCE)
