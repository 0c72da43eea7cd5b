"""SiFT under every ZeRO stage and divided over ranks equals SiFT on the plain model, with the same noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from ranks import run_ranks
from sift_vectors import SiftVector, outcome
from vectors import folders

from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import build_groups
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.shard import shard_of
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.engine import build_engine, gradient_norm

FOLDERS = folders("sift")
CLASSIFICATION, REGRESSION = FOLDERS
# float32: the original's own float32 differs from its float64 by up to 9e-5 (activations), 4.5e-5 (gradients); the
# total loss multiplies the adversarial one by 5.
LOSS, GRADIENT = 2e-4, 1e-4
#: A step of the perturbation is 1e-4 long.
PERTURBATION = {"delta_grad": 4.5e-5, "delta_after_step": 1e-6}


class Layout(NamedTuple):
    """How the model is held."""

    stage: int
    tensor_parallel_size: int = 1
    activation_checkpointing: bool = False


class Step(NamedTuple):
    """What a rank saw of one update; every data-parallel rank has the whole batch."""

    losses: dict[str, float]
    norm: float
    perturbation: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """Whole, by parameter."""


class Watched:
    """The objective of a vector's batch, which notes losses and perturbation on the way."""

    def __init__(self, vector: SiftVector):
        self.vector, self.losses, self.perturbation = vector, {}, {}
        self.moved = vector.sift.moved
        vector.sift.moved = self.note_perturbation

    def note_perturbation(self, delta_BSD: torch.Tensor, gradient_BSD: torch.Tensor) -> torch.Tensor:
        """`Sift.moved`."""
        moved_BSD = self.moved(delta_BSD, gradient_BSD)
        self.perturbation = {"delta_grad": gradient_BSD.clone(), "delta_after_step": moved_BSD.clone()}
        return moved_BSD

    def __call__(self, predict: object) -> torch.Tensor:
        """The total loss."""
        found = outcome(self.vector, predict)
        total = found.total(self.vector.meta["vat_lambda"])
        names = {"task_loss": found.task_loss, "adversarial_loss": found.adversarial_loss, "total_loss": total}
        self.losses = {name: loss.item() for name, loss in names.items()}
        return total


def step(layout: Layout, folder: Path) -> Step:
    """One update from a vector's batch and noise."""
    vector = SiftVector(folder, torch.float32)
    groups = build_groups(Grid.of(dist.get_rank(), dist.get_world_size(), layout.tensor_parallel_size))
    divide(vector.model, groups)
    watched = Watched(vector)
    if layout.activation_checkpointing:
        vector.model.checkpoint_activations()
    settings = {
        "train_micro_batch_size_per_gpu": len(vector.labels),
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        # Below the size of our tensors: nothing stays unpartitioned, and reductions come in several buckets.
        "zero_optimization": {
            "stage": layout.stage,
            "reduce_bucket_size": 2000,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 2000,
        },
    }
    engine = build_engine(vector.model, OptimizerSection(learning_rate=0.0), settings, groups)
    engine.eval()  # no dropout; the vectors have none
    ids, mask = vector.inputs["input_ids"], vector.inputs["attention_mask"]
    engine.backward(engine(ids, mask, objective=watched))
    gradients = {n: join(safe_get_full_grad(p), shard_of(p), groups) for n, p in engine.module.named_parameters()}
    engine.step()
    return Step(watched.losses, gradient_norm(engine), watched.perturbation, gradients)


def join(part: torch.Tensor, shard: object, groups: object) -> torch.Tensor:
    """The whole gradient of a parameter that is divided or not."""
    if shard is None:
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(shard.size)]
    dist.all_gather(parts, part.contiguous(), group=groups.tensor_group)
    return torch.cat(parts, shard.dim).narrow(shard.dim, 0, shard.logical_shape[shard.dim])


LAYOUTS = [
    *(Layout(stage, activation_checkpointing=flag) for stage in (1, 2, 3) for flag in (False, True)),
    *(Layout(stage, tensor_parallel_size=2) for stage in (1, 2, 3)),
    Layout(3, tensor_parallel_size=2, activation_checkpointing=True),
]


@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        pytest.param(folder, layout, marks=pytest.mark.full if folder == REGRESSION and layout.stage == 2 else ())
        for folder in FOLDERS
        for layout in LAYOUTS
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "-".join(map(str, value)),
)
def test_a_step_with_the_same_noise_gives_the_originals_perturbation_losses_and_gradients(folder, layout):
    vector = SiftVector(folder)
    expected = vector.gradients
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    for found in run_ranks(step, 2, layout, folder):
        for name, loss in found.losses.items():
            assert loss == pytest.approx(vector.outputs[name].item(), abs=LOSS), name
        assert found.norm == pytest.approx(norm, rel=1e-4)
        for name, value in found.perturbation.items():
            assert (value - vector.outputs[name]).abs().max() <= PERTURBATION[name], name
        for name, gradient in expected.items():
            assert (found.gradients[name] - gradient).abs().max() <= GRADIENT, name


def in_bf16(stage: int) -> tuple[float, float]:
    """Loss and norm in bf16, accumulating over two micro-batches."""
    vector = SiftVector(CLASSIFICATION, torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": len(vector.labels),
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    engine = build_engine(vector.model, OptimizerSection(learning_rate=0.0), settings)
    engine.eval()
    ids, mask = vector.inputs["input_ids"], vector.inputs["attention_mask"]
    objective = partial(total, vector)
    for _ in range(2):
        loss = engine(ids, mask, objective=objective)
        engine.backward(loss)
        engine.step()
    return loss.item(), gradient_norm(engine)


def total(vector: SiftVector, predict: object) -> torch.Tensor:
    """The objective."""
    return outcome(vector, predict).total(vector.meta["vat_lambda"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_with_accumulation_follows_within_its_rounding(stage):
    vector = SiftVector(CLASSIFICATION)
    norm = torch.stack([g.norm() for g in vector.gradients.values()]).norm().item()
    for loss, actual_norm in run_ranks(in_bf16, 2, stage):
        # 8 bits of mantissa: 2^-8 = 4e-3 per rounding, several in a row.
        assert loss == pytest.approx(vector.outputs["total_loss"].item(), rel=1e-2)
        assert actual_norm == pytest.approx(norm, rel=5e-2)
