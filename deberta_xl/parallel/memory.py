"""How much memory a rank needs: parameters and their state exactly, activations by what autograd keeps (an estimate).

Shape letters of this file's comments:
    B batch   S sequence   D hidden   A heads' width on this rank   F feed-forward width on this rank
    N heads on this rank   R relative rows (2k)   L labelled positions   V vocabulary on this rank
"""

from __future__ import annotations

import math
from typing import NamedTuple

from deberta_xl.architecture import EMD_PASSES, DebertaConfig, HeadConfig
from deberta_xl.config import RunConfig
from deberta_xl.deepspeed_config import DeepSpeedConfig
from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.kernels.registry import KERNELS, AttentionSizes
from deberta_xl.model.parameter_shapes import Shape, parameter_shapes, task_parameter_shapes
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.plan import PLAN
from deberta_xl.parallel.stages import Split, owners

GIB = 2**30
MASTER_AND_MOMENTS = 12
"""Bytes of optimizer state per parameter: float32 weight and Adam's two moments."""
KERNEL = KERNELS["reference"]


class RankMemory(NamedTuple):
    """Bytes on the device of one rank."""

    num_parameters: int
    """Parameters this rank computes with."""
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it; libraries and fragmentation take 1–3 GiB more on a GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """`1.57 B parameters, 17.2 GiB: weights 2.9, gradients 5.8, optimizer 2.2, activations 6.3`."""
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in self._fields[1:])
        return f"{self.num_parameters:,} parameters, {self.total / GIB:.2f} GiB ({parts})"


def estimate_memory(
    architecture: DebertaConfig, run: RunConfig, engine: DeepSpeedConfig, grid: Grid, split: Split
) -> RankMemory:
    """What a rank of `grid`'s stage needs."""
    weight_bytes = 4 if engine.precision == "fp32" else 2
    numel = rank_parameters(architecture, split.units(grid.stage), grid.tensor_parallel_size)
    return rank_memory(numel, engine, grid, stage_activations(architecture, run, grid, split, weight_bytes))


def rank_memory(numel: int, engine: DeepSpeedConfig, grid: Grid, activations: float) -> RankMemory:
    """`numel` parameters and their state as the engine keeps them, beside `activations` bytes."""
    zero, replicas = engine.settings.zero_optimization, grid.data_parallel_size
    weight_bytes = 4 if engine.precision == "fp32" else 2
    sum_bytes = 4 if engine.settings.data_types.grad_accum_dtype == "fp32" else weight_bytes
    offloads_optimizer = zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"
    offloads_weights = zero.offload_param is not None and zero.offload_param.device == "cpu"
    return RankMemory(
        numel,
        weights=0 if offloads_weights else weight_bytes * numel / (replicas if zero.stage == 3 else 1),
        gradients=sum_bytes * numel / (replicas if zero.stage > 1 else 1),
        optimizer=0 if offloads_optimizer else MASTER_AND_MOMENTS * numel / replicas,
        activations=activations,
    )


def estimate_task_memory(
    config: DebertaConfig, head: HeadConfig, run: FinetuneConfig, engine: DeepSpeedConfig, grid: Grid, num_options: int
) -> RankMemory:
    """What a rank of a fine-tuning run needs at its longest input. SiFT keeps two passes for the backward pass."""
    parts = grid.tensor_parallel_size
    numel = sum(rank_numel(name, shape, parts) for name, shape in task_parameter_shapes(config, head).items())
    element = 4 if engine.precision == "fp32" else 2
    rows, length = run.train.micro_batch_size * num_options, run.model.sequence_length
    slices = parts if run.parallel.sequence_parallel else 1
    layer = layer_activations(config, rows, length, length, parts, element, slices)
    hidden = rows * length * config.hidden_size * element
    recomputes = run.train.activation_checkpointing
    kept = config.num_layers * (hidden / slices if recomputes else layer) + hidden
    working = layer if recomputes else 0.0
    working += KERNEL.working_bytes(attention_sizes(config, rows, length, length, parts, element))
    return rank_memory(numel, engine, grid, kept * (2 if run.sift.weight else 1) + working)


def rank_parameters(config: DebertaConfig, units: range, tensor_parallel_size: int) -> int:
    """Parameters of a stage on one tensor-parallel rank, padding of the vocabulary included."""
    total = 0
    for name, shape in parameter_shapes(config).items():
        if any(unit in units for unit in owners(name, config)):
            total += rank_numel(name, shape, tensor_parallel_size)
    return total


def rank_numel(name: str, shape: Shape, tensor_parallel_size: int) -> int:
    """Elements of a parameter on one tensor-parallel rank."""
    rows = -(-shape[0] // tensor_parallel_size) if is_divided(name) else shape[0]
    return rows * math.prod(shape[1:])


def is_divided(name: str) -> bool:
    """Whether the plan gives each tensor-parallel rank a part of a parameter."""
    module, _, kind = name.rpartition(".")
    style = next((style for end, style in PLAN.items() if module.endswith(end)), None)
    if style == "row":
        return kind == "weight"
    return style in ("column", "vocabulary") or name == "head.bias"


def stage_activations(config: DebertaConfig, run: RunConfig, grid: Grid, split: Split, bytes_per_element: int) -> float:
    """What a stage keeps for the backward pass at its fullest, and the temporaries of one layer."""
    rows, length = run.train.micro_batch_size, run.model.sequence_length
    parts = grid.tensor_parallel_size
    slices = parts if run.parallel.sequence_parallel else 1
    layers = split.layers(grid.stage)
    layer = layer_activations(config, rows, length, length, parts, bytes_per_element, slices)
    hidden = rows * length * config.hidden_size * bytes_per_element
    kept = len(layers) * (hidden / slices if run.train.activation_checkpointing else layer)
    # 1F1B: stage s has begun this many micro-batches before its first backward pass.
    in_flight = min(grid.num_stages - grid.stage, run.train.gradient_accumulation_steps(grid.data_parallel_size))
    working = layer if run.train.activation_checkpointing else 0.0
    working += KERNEL.working_bytes(attention_sizes(config, rows, length, length, parts, bytes_per_element))
    if grid.is_last_stage:
        working += head_activations(config, rows, length, run.data.mask_probability, parts, bytes_per_element)
    return in_flight * (kept + hidden) + working


def layer_activations(
    config: DebertaConfig, rows: int, queries: float, keys: int, parts: int, bytes_per_element: int, slices: int = 1
) -> float:
    """Bytes that autograd keeps of one layer (dropout on), its input included.

    Heads and feed-forward width lie on `parts` ranks, and between them the sequence on `slices`.
    """
    e, inner, width = bytes_per_element, config.attention_size / parts, config.intermediate_size / parts
    # What enters attention and feed-forward; two normalised sums and two dropout masks; the context; the up-projection
    # before and after its activation.
    states = rows * queries * (config.hidden_size * (2 * e + (2 * e + 2) / slices) + inner * e + width * 2 * e)
    attention = KERNEL.kept_bytes(attention_sizes(config, rows, queries, keys, parts, e))
    # The relative table behind its dropout, and the mask.
    return states + attention + 2 * config.relative_span * config.hidden_size * (e + 1)


def attention_sizes(
    config: DebertaConfig, rows: int, queries: float, keys: int, parts: int, bytes_per_element: int
) -> AttentionSizes:
    """A layer's attention, its heads on `parts` ranks."""
    return AttentionSizes(
        rows, queries, keys, config.num_heads / parts, config.head_size, 2 * config.relative_span,
        config.has_position_to_content, bytes_per_element,
    )  # fmt: skip


def head_activations(
    config: DebertaConfig, rows: int, length: int, label_share: float, parts: int, bytes_per_element: int
) -> float:
    """The mask decoder's passes over the labelled positions, and the logits with their gradient."""
    labelled = label_share * length
    logits = rows * labelled * config.vocab_size / parts * (bytes_per_element + 3 * 4)
    if config.position_biased_input:
        return logits
    passes = EMD_PASSES * layer_activations(config, rows, labelled, length, parts, bytes_per_element)
    return logits + passes
