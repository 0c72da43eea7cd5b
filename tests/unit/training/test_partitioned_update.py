"""ZeRO-1's update against DeepSpeed's own of the same sums: the weights, what it allocates, how much it launches."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from deberta_xl.checkpoint.fragments import flat_masters
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.engine import build_engine
from deberta_xl.training.zero1.update import PartitionedUpdate

VIEWS = {
    "view",
    "narrow",
    "slice",
    "select",
    "unsqueeze",
    "detach",
    "alias",
    "split",
    "t",
    "empty",
    "_local_scalar_dense",
}
"""Operations that launch nothing on a GPU."""


class Stack(torch.nn.Module):
    """Some layers, with a matrix and a vector each."""

    def __init__(self, num_layers: int, size: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(size, size) for _ in range(num_layers))
        self.order = [*range(num_layers)]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Something to make small."""
        for number in self.order:
            hidden = hidden + torch.tanh(self.layers[number](hidden))
        return hidden.float().square().mean()


def settings(**changes: Any) -> dict[str, Any]:
    """DeepSpeed's configuration: two micro-batches of one row on each rank."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.05,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    } | changes


def new_engine(num_layers: int = 3, size: int = 7, **changes: Any) -> Any:
    """An engine over a `Stack`, alike on every rank."""
    torch.manual_seed(0)
    return build_engine(Stack(num_layers, size), OptimizerSection(), settings(**changes))


def run_backward(engine: Any, step: int, scale: float = 1.0) -> None:
    """The micro-batches of a step; what is left is `engine.step()`."""
    size = engine.module.layers[0].in_features
    for number in range(2):
        generator = torch.Generator().manual_seed(100 * step + 10 * number + torch.distributed.get_rank())
        engine.backward(engine((scale * torch.randn(1, size, generator=generator)).bfloat16()))
        if number == 0:
            engine.step()


class Trained(NamedTuple):
    """What came of some steps."""

    update: str
    """The engine's class."""
    norms: list[float]
    masters: list[torch.Tensor]


def trained(*, is_ours: bool = True, **changes: Any) -> Trained:
    """Three steps of our update, or of DeepSpeed's."""
    with contextlib.nullcontext() if is_ours else mock.patch.object(PartitionedUpdate, "take_over"):
        engine = new_engine(**changes)
    norms = []
    for step in range(3):
        run_backward(engine, step)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    assert not any(sums.any() for sums in engine.optimizer.fp32_groups_gradients_flat)
    return Trained(type(engine.optimizer).__name__, norms, [master.detach() for master in flat_masters(engine)])


def trained_in_three_ways() -> tuple[Trained, Trained, Trained]:
    """By our update, by DeepSpeed's, and by ours where it adds up when a backward pass is over."""
    return trained(), trained(is_ours=False), trained(bf16={"enabled": True})


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_and_norms_are_those_of_deepspeeds_update(world_size):
    # One rank adds up the same numbers in the same order. Several take the norm of each one's part of a parameter,
    # and a third of a sum is rounded together with the clipping.
    tolerance = 0 if world_size == 1 else 4 * torch.finfo(torch.float32).eps
    for ours, theirs, later in run_ranks(trained_in_three_ways, world_size):
        assert (ours.update, theirs.update) == ("PartitionedUpdate", "BF16_Optimizer")
        assert ours.norms == pytest.approx(theirs.norms, rel=tolerance, abs=0)
        torch.testing.assert_close(ours.masters, theirs.masters, rtol=tolerance, atol=tolerance)
        assert later.norms == ours.norms
        torch.testing.assert_close(later.masters, ours.masters, rtol=0, atol=0)


OVERLAPPED = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 60}
"""A sum for every layer's matrix."""


def trained_while_sums_travel(orders: dict[int, list[list[int]]], *, is_early: bool) -> tuple[list[int], Trained]:
    """As many steps as this rank computes its layers in `orders`; how many sums each began before its update."""
    engine, early, norms = new_engine(zero_optimization=OVERLAPPED), [], []
    if not is_early:
        engine.optimizer.is_last_micro_batch = None
    for step, order in enumerate(orders[torch.distributed.get_rank()]):
        engine.module.order = order
        run_backward(engine, step)
        early.append(len(engine.optimizer.operations))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    masters = [master.detach() for master in flat_masters(engine)]
    return early, Trained(type(engine.optimizer).__name__, norms, masters)


def both_trained(orders: dict[int, list[list[int]]]) -> list[tuple[list[int], Trained]]:
    """Where sums are begun early, and where all wait for the update."""
    return [trained_while_sums_travel(orders, is_early=is_early) for is_early in (True, False)]


def test_sums_that_are_begun_early_are_the_same_whatever_order_and_layers_a_ranks_graph_has():
    forward, backward = [0, 1, 2], [2, 1, 0]
    orders = {0: [forward] * 3, 1: [backward, backward, backward[:2]]}
    (first, waiting), (second, _) = run_ranks(both_trained, 2, orders)
    # Three matrices and the vectors together; their order is known after the first step. Where a layer is left out,
    # what would follow it waits for the update.
    assert first[0] == [0, 4, 4]
    assert second[0][:2] == [0, 4]
    assert second[0][2] < 4
    assert waiting[0] == [0, 0, 0]
    assert first[1].norms == waiting[1].norms
    torch.testing.assert_close(first[1].masters, waiting[1].masters, rtol=0, atol=0)


class Recorded(TorchDispatchMode):
    """What a stretch of code would launch on a GPU, and what it allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_bytes = 0
        """Of all tensors that are made, however short they live."""

    def around(self, call: Callable[[], None]) -> Callable[[], None]:
        """The same call, recorded."""

        def recorded() -> None:
            with self:
                call()

        return recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        made = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_of(found)}
        self.num_bytes += sum(made[place].untyped_storage().nbytes() for place in made.keys() - given)
        name = func.overloadpacket.__name__
        self.names += [name] if name not in VIEWS else []
        return found


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All of them."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def cost_of_an_update(num_layers: int) -> tuple[float, list[str]]:
    """What the second update allocates, as a share of the states, and what it launches, in nine sums."""
    size = 48
    zero = OVERLAPPED | {"reduce_bucket_size": num_layers // 8 * size * size}
    engine = new_engine(num_layers, size, zero_optimization=zero)
    engine.optimizer.is_last_micro_batch = None  # all of the sums begin with the update, where they are counted
    for group in engine.optimizer.optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    run_backward(engine, 0)
    engine.step()
    recorded = Recorded()
    # DeepSpeed reduces at the end of the backward pass.
    with mock.patch.object(engine, "allreduce_gradients", recorded.around(engine.allreduce_gradients)):
        run_backward(engine, 1)
    recorded.around(engine.step)()
    states = sum(p.numel() for p in engine.module.parameters()) * (2 + 4 + 12 / torch.distributed.get_world_size())
    return recorded.num_bytes / states, recorded.names


def costs_of_updates() -> list[tuple[float, list[str]]]:
    """By our update and by DeepSpeed's."""
    ours = cost_of_an_update(16)
    with mock.patch.object(PartitionedUpdate, "take_over"):
        return [ours, cost_of_an_update(16)]


def test_an_update_allocates_next_to_nothing_and_launches_few_operations():
    (share, names), (their_share, their_names) = run_ranks(costs_of_updates, 2)[0]
    assert share < 0.01 < 0.1 < their_share
    copied_by_gloo = names.count("_reduce_scatter_base_")
    assert len(names) - copied_by_gloo <= 50 < len(their_names), Counter(names)


def update_after_an_infinite_gradient() -> tuple[bool, float, bool, bool]:
    """Whether a step was left out, its norm, whether the weights stayed, and whether the next update is as if alone."""
    engine, alone = new_engine(), new_engine()
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    run_backward(engine, 0, math.inf)
    engine.step()
    is_left_out, norm = engine.optimizer.overflow, engine.get_global_grad_norm()
    stayed = all(torch.equal(*pair) for pair in zip(before, engine.module.parameters(), strict=True))
    for each in (engine, alone):
        run_backward(each, 1)
        each.step()
    pairs = zip(engine.module.parameters(), alone.module.parameters(), strict=True)
    return is_left_out, norm, stayed, all(torch.equal(*pair) for pair in pairs)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_forgotten():
    assert run_ranks(update_after_an_infinite_gradient, 2) == [(True, math.inf, True, True)] * 2


def classes_with(*settings_changed: dict[str, Any]) -> list[str]:
    """Of the engines' optimizers."""
    return [type(new_engine(**changes).optimizer).__name__ for changes in settings_changed]


def test_sums_in_less_than_float32_stay_deepspeeds():
    found = run_ranks(classes_with, 1, {"communication_data_type": "bf16"}, {"data_types": {}})
    assert found == [["BF16_Optimizer", "DeepSpeedZeroOptimizer"]]
