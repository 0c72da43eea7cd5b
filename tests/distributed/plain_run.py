"""A small model trained by torch alone on one process, and what a run in any layout is compared with it by.

That is: loss and gradient norm of every step; the gradient of every parameter, as Adam's first moment after one step,
m = (1 − β1) g (arXiv 1412.6980).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from full_state import FullState
from small_dataset import SmallDataset
from torch import Tensor

from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.objectives.rows import MaskedRows, step_batches
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.pretraining import DataSection, OptimizerSection, TrainSection
from deberta_xl.training.optimizer import build_optimizer

LossOf = Callable[[MaskedLanguageModel], Tensor]
"""A step's loss, as a function of the model."""
ROWS, LENGTH, STEPS, SEED = 8, 48, 10, 3
OPTIMIZER = OptimizerSection(learning_rate=2e-3)
MAX_GRAD_NORM = 1.0


class Curve(NamedTuple):
    """Loss and gradient norm of every step."""

    losses: list[float]
    norms: list[float]

    def after(self, step: int) -> Curve:
        """The steps after `step`."""
        return Curve(self.losses[step:], self.norms[step:])


def architecture(vocab_size: int, **options: object) -> DebertaConfig:
    """Five layers with everything: convolution, buckets, shared projections; dropout off."""
    config = DebertaConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=5, num_heads=4, intermediate_size=64, position_buckets=8,
        max_position_embeddings=LENGTH, conv_kernel_size=3, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return replace(config, **options)


def warmup_steps(steps: int) -> int:
    """Half a run of ten: the rate changes at every step of it."""
    return min(5, steps)


def batches_from(
    dataset: SmallDataset, micro_batch_size: int, rank: int = 0, size: int = 1
) -> Iterator[list[MaskedRows]]:
    """The micro-batches of a data-parallel rank for every step."""
    data = PretrainingData(TokenStore(dataset.train), dataset.tokenizer, DataSection(), LENGTH, seed=SEED)
    train = TrainSection(global_batch_size=ROWS, micro_batch_size=micro_batch_size)
    return step_batches(data, train, 0, MaskedRows.of, rank=rank, size=size)


def masked_losses(dataset: SmallDataset) -> Iterator[LossOf]:
    """For every step, the loss of masked-LM in one forward."""
    for (batch,) in batches_from(dataset, ROWS):
        yield partial(masked_loss, batch)


def masked_loss(batch: MaskedRows, model: MaskedLanguageModel) -> Tensor:
    """Of a batch."""
    return model(batch.input_ids_BS, batch.segments_BS, labels=batch.labelled).loss


def train_plainly(
    dataset: SmallDataset,
    config: DebertaConfig,
    steps: int = STEPS,
    optimizer: OptimizerSection = OPTIMIZER,
    losses: Callable[[SmallDataset], Iterator[LossOf]] = masked_losses,
) -> tuple[Curve, FullState]:
    """The reference: one process, the whole batch at once, torch's AdamW and clipping; the state after step 1."""
    model = MaskedLanguageModel(config, seed=SEED)
    adam = build_optimizer(model, optimizer)
    loss_of_steps = losses(dataset)
    curve, state = Curve([], []), {}
    for step in range(1, steps + 1):
        for group in adam.param_groups:
            group["lr"] = optimizer.learning_rate * min(step / warmup_steps(steps), 1.0)
        adam.zero_grad()
        loss = next(loss_of_steps)(model)
        loss.backward()
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        adam.step()
        curve.losses.append(loss.item())
        if step == 1:
            state = state_of(model, adam)
    return curve, state


def state_of(model: MaskedLanguageModel, adam: torch.optim.Optimizer) -> FullState:
    """A copy of weights and moments."""
    named = dict(model.named_parameters())
    moments = {kind: {n: adam.state[p][kind].clone() for n, p in named.items()} for kind in ("exp_avg", "exp_avg_sq")}
    return moments | {"master": {n: p.detach().clone() for n, p in named.items()}}


def assert_equal_curves(actual: Curve, expected: Curve, what: object, loss: float = 1e-5, norm: float = 1e-5) -> None:
    """Losses and gradient norms of every step agree, relatively. In float32: the same sums in other orders."""
    for name, tolerance in (("losses", loss), ("norms", norm)):
        torch.testing.assert_close(
            torch.tensor(getattr(actual, name)), torch.tensor(getattr(expected, name)[: len(actual.losses)]),
            rtol=tolerance, atol=0, msg=lambda text, name=name: f"{name} of {what}: {text}",
        )  # fmt: skip


def assert_equal_gradients(actual: FullState, expected: FullState, what: object, tolerance: float = 1e-5) -> None:
    """Every gradient agrees: ‖Δ‖ ≤ tolerance·‖g‖ + 1e-7·global norm (some gradients are mathematically zero)."""
    gradients: dict[str, Tensor] = expected["exp_avg"]
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert actual["exp_avg"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (actual["exp_avg"][name] - gradient).norm()
        assert difference <= tolerance * gradient.norm() + 1e-7 * total, (
            f"{name} of {what}: {difference:.3g} of {gradient.norm():.3g}"
        )
