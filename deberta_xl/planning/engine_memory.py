"""What DeepSpeed's engine holds on one rank's device: a model's states, and what it takes to reduce and update them.

Read from DeepSpeed 0.19, and measured on engines of every ZeRO stage (tests/unit/planning/test_engine_memory.py).
"""

from __future__ import annotations

from typing import NamedTuple

from deberta_xl.planning.cost import MASTER_AND_MOMENTS
from deberta_xl.settings.deepspeed_config import DeepSpeedConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class EngineMemory(NamedTuple):
    """Bytes on the device of one rank."""

    weights: float
    gradients: float
    """Sums over micro-batches, which stay from one to the next."""
    optimizer: float
    buffers: float
    """Beside the activations: gradients on their way, and weights that are gathered (ZeRO-3)."""
    update: float
    """What an update copies; activations and buffers are gone then."""


class Held(NamedTuple):
    """A rank's part of a model, by number of elements."""

    num_parameters: int
    largest: int
    """Of one parameter."""
    replicas: int
    """Ranks over which ZeRO partitions."""


def engine_memory(engine: DeepSpeedConfig, held: Held) -> EngineMemory:
    """What the engine takes that these settings make."""
    if engine.zero_stage == 3:
        return partitioned_weights(engine, held)
    if engine.zero_stage == 1 and engine.precision == "bf16" and sum_bytes(engine) == 4:
        return flat_sums(engine, held)
    return bucketed_sums(engine, held)


def sum_bytes(engine: DeepSpeedConfig) -> int:
    """Of an element of the sums over micro-batches."""
    return BYTES[engine.settings.data_types.grad_accum_dtype or engine.precision]


def sent_bytes(engine: DeepSpeedConfig) -> int:
    """Of an element that is summed over ranks."""
    return BYTES[engine.settings.communication_data_type]


def optimizer_bytes(engine: DeepSpeedConfig, held: Held) -> float:
    """Of a rank's master weights and moments."""
    return 0 if engine.offloads_optimizer else MASTER_AND_MOMENTS * held.num_parameters / held.replicas


def flat_sums(engine: DeepSpeedConfig, held: Held) -> EngineMemory:
    """ZeRO-1 with float32 sums of bfloat16 gradients (`training/zero1/update.py`).

    Sums that travel in less than float32 are DeepSpeed's own update's, which copies them whole, twice.
    """
    element, sent, whole = engine.weight_bytes, sent_bytes(engine), held.num_parameters
    waiting = held.largest if engine.settings.bf16.immediate_grad_update else whole
    return EngineMemory(
        weights=element * whole,
        gradients=4 * whole,
        optimizer=optimizer_bytes(engine, held),
        buffers=element * waiting,
        update=0 if sent == 4 else (4 + sent) * whole,
    )


def bucketed_sums(engine: DeepSpeedConfig, held: Held) -> EngineMemory:
    """ZeRO-2, and ZeRO-1 in other precisions: gradients travel in buckets, of which each is copied to be reduced."""
    zero, element, sums, sent = (
        engine.settings.zero_optimization,
        engine.weight_bytes,
        sum_bytes(engine),
        sent_bytes(engine),
    )
    whole, part = held.num_parameters, held.num_parameters / held.replicas
    is_second, has_own_sums = zero.stage == 2, sums != element
    staged = element if is_second else sums
    travelling = max(min(zero.reduce_bucket_size, whole), held.largest)
    copied = staged + (sent if sent != staged else 0)
    own_part = sums * part if has_own_sums and not is_second else 0
    return EngineMemory(
        weights=element * whole,
        gradients=sums * (part if is_second else whole),
        optimizer=optimizer_bytes(engine, held),
        buffers=num_buckets(engine) * staged * zero.reduce_bucket_size
        + copied * travelling
        + element * held.largest
        + own_part,
        update=own_part if has_own_sums else (4 + (element if element != 4 else 0)) * part,
    )


def num_buckets(engine: DeepSpeedConfig) -> int:
    """One is filled while another travels."""
    zero = engine.settings.zero_optimization
    return (2 if zero.overlap_comm else 1) if zero.contiguous_gradients else 0


def partitioned_weights(engine: DeepSpeedConfig, held: Held) -> EngineMemory:
    """ZeRO-3: weights are gathered for use, as many as may be live, or the largest; its bucket is always there."""
    zero, element, sums, sent = (
        engine.settings.zero_optimization,
        engine.weight_bytes,
        sum_bytes(engine),
        sent_bytes(engine),
    )
    whole, part = held.num_parameters, held.num_parameters / held.replicas
    live = min(whole, max(zero.stage3_max_live_parameters, held.largest))
    oversized = held.largest > zero.reduce_bucket_size
    return EngineMemory(
        weights=0 if engine.offloads_weights else element * part,
        gradients=0 if engine.offloads_optimizer else sums * part,
        optimizer=optimizer_bytes(engine, held),
        buffers=element * live
        + sent * zero.reduce_bucket_size
        + (element + (2 * sent if oversized else 0)) * held.largest,
        update=0 if engine.offloads_optimizer else 4 * min(zero.sub_group_size, whole) / held.replicas,
    )
