"""AdamW with decay on matrices and tables only, and the original's form of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.parts import parts_by_parameter
from deberta_xl.model.trunk import Trunk
from deberta_xl.settings.finetuning import FinetuneOptimizerSection
from deberta_xl.settings.pretraining import OptimizerSection

ONE_LEARNER: Mapping[str, float] = {"": 1.0}
"""All parameters learn together."""
PART_ELEMENTS = 2**24
"""Elements that are updated at a time; enough to keep any device busy, and 64 MiB of temporaries."""


def parameter_groups(
    model: nn.Module,
    section: OptimizerSection,
    learners: Mapping[str, float] = ONE_LEARNER,
    portion: int | None = None,
) -> list[dict[str, Any]]:
    """Groups of one learner and equal depth: matrices and tables with decay; biases and norms, vectors, without.

    `rate_share` is the share of the schedule's rate at which a group learns: the learner's, times what layer-wise decay
    leaves of it. Without either there are two groups, and it is 1. Where `portion` is given, a group that has more
    elements is divided into several, in the model's order.
    """
    shares = rate_shares(model, section.layer_decay) if isinstance(section, FinetuneOptimizerSection) else {}
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learner = next((known for known in learners if not known or name.startswith(f"{known}.")), None)
            if learner is None:
                raise ConfigError(
                    f"the parameter {name} belongs to none of the objective's learners ({', '.join(learners)}): name "
                    "its module among them"
                )
            share = learners[learner] * (shares[name] if shares else 1.0)
            groups.setdefault((learner, share, parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": section.weight_decay * decays,
            "rate_share": share,
            "learner": learner,
        }
        for learner, share, decays in sorted(groups, key=lambda key: (key[0], -key[1], not key[2]))
        for parameters in portions(groups[learner, share, decays], portion)
    ]


def portions(parameters: Sequence[nn.Parameter], num_elements: int | None) -> list[list[nn.Parameter]]:
    """Runs of the parameters of at most `num_elements`, or of one that is larger; without it, all."""
    if num_elements is None:
        return [[*parameters]]
    found: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            found.append([])
            room = num_elements
        found[-1].append(parameter)
        room -= parameter.numel()
    return found


def rate_shares(model: Trunk, layer_decay: float) -> dict[str, float]:
    """Share of the rate at which each parameter learns: each layer's is `layer_decay` times that of the layer above."""
    parts = parts_by_parameter(model.parts, [name for name, _ in model.named_parameters()])
    return {name: layer_decay**part.layers_above for name, part in parts.items()}


def build_optimizer(
    model: nn.Module,
    section: OptimizerSection,
    learners: Mapping[str, float] = ONE_LEARNER,
    portion: int | None = None,
) -> LearnsInTurns:
    """torch's AdamW, or the original's form without bias correction (for continuing released weights).

    Of `parameter_groups` with these learners and this portion.
    """
    groups = parameter_groups(model, section, learners, portion)
    options = {"lr": section.learning_rate, "betas": (section.beta1, section.beta2), "eps": section.epsilon}
    if not section.bias_correction:
        return AdamWithoutBiasCorrection(groups, **options)
    # Fused, an update needs no tensor as large as the rank's shard beside it.
    return AdamW(groups, **options, fused=True if torch.cuda.is_available() else None)


class LearnsInTurns(torch.optim.Optimizer):
    """Updates one learner's groups, or all."""

    learner: str | None = None
    """Whose groups the next step updates; None updates all."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One update of these groups; the others' weights, moments and counts of updates stay as they are."""
        assert closure is None, "gradients come from the engine"
        groups = self.param_groups
        self.param_groups = [group for group in groups if self.learner in (None, group["learner"])]
        try:
            super().step()
        finally:
            self.param_groups = groups


class AdamW(LearnsInTurns, torch.optim.AdamW):
    """torch's."""


class PlainAdam(torch.optim.Optimizer):
    """The original release's optimizer (microsoft/DeBERTa: XAdam in DeBERTa/optims/xadam.py).

    m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,  θ ← θ − lr (m / (√v + ε) + decay θ).

    A parameter is updated part by part: the engine's is as large as a rank's shard, and so would be what is computed.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state_of(parameter)
                    whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                    for part in zip(*(tensor.view(-1).split(PART_ELEMENTS) for tensor in whole), strict=True):
                        update(*part, group)
                    state["step"] += 1

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The moments of a parameter, zero before its first update."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


class AdamWithoutBiasCorrection(LearnsInTurns, PlainAdam):
    """`PlainAdam` in turns."""


def update(parameter: Tensor, gradient: Tensor, average: Tensor, square: Tensor, group: Mapping[str, Any]) -> None:
    """One update of a part of a parameter and of its moments."""
    beta1, beta2 = group["betas"]
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = square.sqrt().add_(group["eps"])
    change = torch.div(average, denominator, out=denominator).add_(parameter, alpha=group["weight_decay"])
    parameter.add_(change, alpha=-group["lr"])
