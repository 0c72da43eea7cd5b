"""The update of ZeRO-1 on float32 sums of gradients, of which this rank reduces, clips and applies its own part.

DeepSpeed's BF16_Optimizer adds every micro-batch's gradients to one flat float32 tensor per group. At the end of a step
it copies that tensor to reduce it, sums all of it on every rank, and takes the norm of each parameter's gradient by
itself: six bytes per parameter for a moment, and launches by the thousand. Here the sums are scattered in place to the
ranks whose part of the weights they are for; norm and clipping are those of the part. Neither that nor the gather of
the weights allocates anything: a rank's part is a view of the whole. With `overlap_comm` the sums are several, and each
is reduced while the last backward pass still computes others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import Tensor, nn

from deberta_xl.checkpoint.fragments import group_fragments
from deberta_xl.training.zero1.readiness import Readiness

PORTION_ELEMENTS = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`."""
TO_CLIP = np.float32(1e-6)
"""Added to the norm that the bound is divided by, as everywhere in DeepSpeed and torch."""


class PartitionedUpdate(BF16_Optimizer):
    """BF16_Optimizer with another `step`; sums, master weights and moments lie where it has them."""

    counted: list[Tensor]
    """The gradients on this rank that count in the norm: views of its part, one per parameter; where it counts none,
    one of no elements."""
    is_last_micro_batch: Callable[[], bool] | None
    """Whether nothing will be added to the sums after this backward pass; None where they wait for its end anyway."""
    readiness: dict[str | None, Readiness]
    """Whose turn it is (`Turns`) -> which sums are complete."""
    operations: list[dist.Work]
    """Sums on their way."""

    @classmethod
    def take_over(cls, engine: DeepSpeedEngine) -> None:
        """Make this the update of an engine whose settings it is for.

        DeepSpeed chooses the class of its optimizer, and its pipeline asks for just that class when it is built.
        """
        optimizer = engine.optimizer
        assert type(optimizer) is BF16_Optimizer, f"DeepSpeed has chosen {type(optimizer).__name__}"
        optimizer.__class__ = cls
        optimizer.counted = counted_gradients(optimizer)
        overlaps = engine.zero_overlap_comm() and optimizer.immediate_grad_update and not engine.pipeline_parallelism
        optimizer.is_last_micro_batch = engine.is_gradient_accumulation_boundary if overlaps else None
        optimizer.readiness = {}
        optimizer.operations = []

    @property
    def ready(self) -> Readiness:
        """Which sums are complete, in this turn."""
        learner = self.optimizer.learner
        if learner not in self.readiness:
            self.readiness[learner] = Readiness([len(group) for group in self.bf16_groups])
        return self.readiness[learner]

    @property
    def num_replicas(self) -> int:
        """Ranks that hold other parts of the same sums."""
        return dist.get_world_size(self.dp_process_group)

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """What the engine is to reduce before it calls `step`: nothing."""
        return [], {}

    @torch.no_grad()
    def _update_hp_grad(self, lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Add a micro-batch's gradient to its float32 sum, in one pass and without a copy in float32."""
        if lp.grad is None:
            return
        total = self.fp32_groups_gradients[group_idx][param_idx]
        total.add_(lp.grad.view(-1))
        lp._hp_grad = total  # where DeepSpeed's pipeline looks for the gradient of a weight that two stages share
        if clear_lp_grads:
            lp.grad.zero_()

    def accumulate_hp_grads_and_remove_lp(self, lp_param: nn.Parameter, group_idx: int, param_idx: int) -> None:
        """A gradient is there: add it, and begin to reduce what is complete with it."""
        super().accumulate_hp_grads_and_remove_lp(lp_param, group_idx, param_idx)
        if self.num_replicas > 1 and self.is_last_micro_batch and self.is_last_micro_batch():
            for number in self.ready.arrive(group_idx, param_idx):
                self.scatter(number)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Reduce, clip and apply this rank's part, and gather the weights; nothing where the gradient is not finite.

        The engine calls `zero_grad` afterwards, which empties the sums.
        """
        assert closure is None, "gradients come from the engine"
        parts = self.fp32_groups_gradient_flat_partition
        self.scatter_sums()
        norm, factor = self.norm_and_factor()
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = math.inf if self.overflow else norm
        if self.overflow:
            return
        if factor != 1:
            torch._foreach_mul_(parts, factor)
        for master, gradient in zip(self.fp32_groups_flat_partition, parts, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()

    def scatter(self, number: int) -> None:
        """Begin to sum a group's gradients over the replicas; each gets its part, in place. Collective."""
        whole, part = self.fp32_groups_gradients_flat[number], self.fp32_groups_gradient_flat_partition[number]
        self.operations.append(dist.reduce_scatter_tensor(part, whole, group=self.dp_process_group, async_op=True))

    def scatter_sums(self) -> None:
        """Reduce what is left, and wait for all. Collective."""
        if self.num_replicas == 1:
            return
        ready = self.ready
        for number in ready.rest():
            self.scatter(number)
        for operation in self.operations:
            operation.wait()
        self.operations.clear()
        if self.is_last_micro_batch and ready.order is None:
            ready.order = self.agreed(ready.complete)
        ready.forget()

    def agreed(self, order: Sequence[int]) -> list[int]:
        """The first replica's. Collective."""
        numbers = torch.full((len(self.bf16_groups),), -1, device=self.fp32_groups_gradients_flat[0].device)
        numbers[: len(order)] = torch.tensor(order, dtype=numbers.dtype)
        dist.broadcast(numbers, group=self.dp_process_group, group_src=0)
        return [number for number in numbers.tolist() if number >= 0]

    def norm_and_factor(self) -> tuple[float, float]:
        """The norm of the mean gradient, and what the sums are multiplied by: over the replicas, and clipped.

        Collective. The device is waited for here, and nowhere else in an update.
        """
        total = torch.stack(torch._foreach_norm(self.counted)).square().sum()
        dist.all_reduce(total)  # every element of the model counts on one rank of all
        norm = np.float32(total.sqrt().item() / self.num_replicas)
        # In float32 step by step, as DeepSpeed and torch have it.
        clipped = np.float32(self.clip_grad) * np.reciprocal(norm + TO_CLIP) if self.clip_grad > 0 else 1.0
        return float(norm), min(1.0, float(clipped)) / self.num_replicas

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Round this rank's master weights to the model's precision, and gather everyone's, in place. Collective."""
        place = dist.get_rank(self.dp_process_group)
        parts = [parts[place] for parts in self.bf16_partitioned_groups]
        torch._foreach_copy_(parts, self.fp32_groups_flat_partition)
        if self.num_replicas > 1:
            for whole, part in zip(self.bf16_groups_flat, parts, strict=True):
                dist.all_gather_into_tensor(whole, part, group=self.dp_process_group)

    def clear_hp_grads(self) -> None:
        """Empty the sums."""
        torch._foreach_zero_(self.fp32_groups_gradients_flat)


def is_for(settings: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's settings take BF16_Optimizer, and sum in float32 over micro-batches and ranks."""
    sums = settings.get("data_types", {}).get("grad_accum_dtype"), settings.get("communication_data_type")
    is_bfloat16 = settings.get("bf16", {}).get("enabled", False)
    return settings["zero_optimization"]["stage"] == 1 and is_bfloat16 and sums == ("fp32", "fp32")


def portion_elements(settings: Mapping[str, Any]) -> int | None:
    """How many elements are reduced at a time while the last backward pass goes on; None where it is waited for."""
    zero = settings["zero_optimization"]
    return zero.get("reduce_bucket_size", PORTION_ELEMENTS) if is_for(settings) and zero.get("overlap_comm") else None


def counted_gradients(optimizer: BF16_Optimizer) -> list[Tensor]:
    """Of this rank's part of the gradients, what no other rank counts in the norm."""
    masters, gradients = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
    gradient_of = {id(master): gradient for master, gradient in zip(masters, gradients, strict=True)}
    is_first_slice = bwc_tensor_model_parallel_rank(mpu=optimizer.mpu) == 0
    counted = [
        gradient_of[id(flat)].narrow(0, start, numel)
        for parameter, (_, numel, flat, start) in group_fragments(optimizer).items()
        if numel and is_counted(parameter, is_first_slice=is_first_slice)
    ]
    return counted or [gradients[0][:0]]


def is_counted(parameter: Any, *, is_first_slice: bool) -> bool:
    """Whether this rank's copy of a parameter counts: the first of those that tensor ranks or stages repeat."""
    is_repeated_by_stage = getattr(parameter, "ds_pipe_replicated", False)
    return not is_repeated_by_stage and (is_first_slice or is_model_parallel_parameter(parameter))
