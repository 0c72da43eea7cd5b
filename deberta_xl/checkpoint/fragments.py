"""Where a DeepSpeed engine keeps the optimizer's state: the float32 master weights and Adam's moments of this rank.

ZeRO lays the parameters of a group end to end in one flat tensor and gives each data-parallel rank a slice of it
(stages 1 and 2), or cuts every parameter by itself (stage 3). A `Fragment` is the part of one parameter that lies here.
Under tensor parallelism each data-parallel group does so with its own shards, and "parameter" here means the shard.
DeepSpeed's public accessors (`safe_get_full_…`) are not used: they move everything between the ranks, fail before the
first step, and with two parameter groups after it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as distributed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.rank_file import KINDS, Piece
from deberta_xl.parallel.pipeline import plain_model
from deberta_xl.parallel.shard import shard_of

MOMENTS = tuple(kind for kind in KINDS if kind != "master")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scaler (fp16) changes as it goes."""

NamedParameters = Sequence[tuple[str, nn.Parameter]]


class Fragment(NamedTuple):
    """The part of a parameter whose optimizer state this rank holds."""

    piece: Piece
    """Which part of which parameter."""
    flat: Tensor
    """The engine's flat float32 tensor it lies in, the key of its Adam state."""
    start: int
    """First element in `flat`."""


def canonical_parameters(engine: DeepSpeedEngine) -> NamedParameters:
    """The parameters on this rank by the names the plain model gives them; of a pipeline, those of this stage."""
    return list(plain_model(engine.module).named_parameters())


def engine_fragments(engine: DeepSpeedEngine, names: NamedParameters) -> list[Fragment]:
    """This rank's fragments, in the order of `names` (canonical name, parameter of the engine).

    Raises CheckpointError for an engine whose state is not understood, naming what to change.
    """
    check_engine(engine)
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        by_parameter = _stage_3_fragments(optimizer)
    else:
        by_parameter = group_fragments(optimizer)
    left_out = [name for name, parameter in names if parameter not in by_parameter]
    if left_out:
        raise CheckpointError(f"these parameters are in no optimizer group: {', '.join(left_out)}")
    return [
        Fragment(piece, flat, start)
        for name, parameter in names
        for offset, numel, flat, start in [by_parameter[parameter]]
        for piece in [_piece(name, parameter, offset, numel)]
        if piece.numel > 0
    ]


def _piece(name: str, parameter: nn.Parameter, offset: int, numel: int) -> Piece:
    """A range of a parameter, without a shard's padding (which comes last)."""
    shape, shard = parameter_shape(parameter), shard_of(parameter)
    if shard is not None:
        assert shard.local_shape == shape, f"{name} is {shape} here, which is not its {shard}"
        numel = max(0, min(numel, shard.numel - offset))
    return Piece(name, shape, offset, numel, shard)


def check_engine(engine: DeepSpeedEngine) -> None:
    """Refuse an engine whose optimizer state has addresses or a precision that are not supported here."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)):
        raise CheckpointError(
            f"checkpoints need ZeRO, but the engine's optimizer is a {type(optimizer).__name__}; "
            'set "zero_optimization": {"stage": 1} (or 2, 3) in the DeepSpeed configuration'
        )
    if getattr(optimizer, "round_robin_gradients", False):
        raise CheckpointError(
            '"round_robin_gradients": true is not supported, since it makes DeepSpeed\'s own map of parameters to '
            "optimizer state wrong; set it to false in the DeepSpeed configuration"
        )
    precisions = {flat.dtype for flat in flat_masters(engine)}
    if precisions != {torch.float32}:
        raise CheckpointError(f"master weights must be float32 for checkpoints, but the engine holds {precisions}")


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter on this tensor-parallel rank, also while ZeRO-3 keeps it cut up."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def logical_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter in the plain model."""
    shard = shard_of(parameter)
    return parameter_shape(parameter) if shard is None else shard.logical_shape


def flat_masters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The flat float32 tensors the inner optimizer steps: one per parameter group, under ZeRO-3 per sub-group."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    if isinstance(optimizer, BF16_Optimizer):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def group_fragments(
    optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer,
) -> dict[nn.Parameter, tuple[int, int, Tensor, int]]:
    """Parameter → (offset, numel, flat, start), where each rank holds one slice of the group's parameters in a row.

    The addresses come from the flat tensors' own offsets, not from `_hp_mapping`.
    """
    if isinstance(optimizer, BF16_Optimizer):
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        offsets = [_running_offsets(group) for group in groups]
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups
        offsets = optimizer.round_robin_bit16_offsets
    found = {}
    for index, flat in enumerate(flats):
        slice_start = flat.numel() * distributed.get_rank(group=optimizer.real_dp_process_group[index])
        slice_end = slice_start + flat.numel()
        for parameter, first in zip(groups[index], offsets[index], strict=True):
            start, end = max(first, slice_start), min(first + parameter.numel(), slice_end)
            found[parameter] = (start - first, max(0, end - start), flat, start - slice_start)
    return found


def _running_offsets(group: Iterable[nn.Parameter]) -> list[int]:
    """Where each parameter of a group begins when they lie end to end."""
    offsets, reached = [], 0
    for parameter in group:
        offsets.append(reached)
        reached += parameter.numel()
    return offsets


def _stage_3_fragments(
    optimizer: DeepSpeedZeroOptimizer_Stage3,
) -> dict[nn.Parameter, tuple[int, int, Tensor, int]]:
    """Parameter → (offset, numel, flat, start), where each rank holds an equal, padded share of each parameter."""
    found = {}
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        for parameter in group:
            _, start, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = share * distributed.get_rank(group=optimizer._get_param_partition_group(parameter))
            found[parameter] = (offset, max(0, min(share, parameter.ds_numel - offset)), flat, start)
    return found


def fragment_values(engine: DeepSpeedEngine, fragments: Iterable[Fragment], kind: str) -> list[tuple[Piece, Tensor]]:
    """Each piece with its own elements, a writable flat view into the engine's state. Needs `create_adam_state`."""
    state = engine.optimizer.optimizer.state
    return [
        (piece, (flat.detach() if kind == "master" else state[flat][kind]).narrow(0, start, piece.numel))
        for piece, flat, start in fragments
    ]


def create_adam_state(engine: DeepSpeedEngine) -> None:
    """Give every flat tensor the moments it gets at its first step, where it has none, and link them to DeepSpeed.

    What torch and DeepSpeed do lazily: zero moments and step 0. The link (DeepSpeed's per-parameter views of them) is
    renewed, since DeepSpeed makes it after the first group's step and so leaves out all other groups.
    """
    inner = engine.optimizer.optimizer
    for flat in flat_masters(engine):
        state = inner.state[flat]
        if not all(moment in state for moment in MOMENTS):
            state.update({moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS})
            state["step"] = _first_step_counter(inner, flat)
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _first_step_counter(inner: torch.optim.Optimizer, flat: Tensor) -> Tensor | int:
    """Step 0 as the optimizer keeps it: an integer in DeepSpeed's own Adams, a float32 tensor in torch's."""
    if type(inner).__module__.startswith("deepspeed."):
        return 0
    on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
    return torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")


def learners(engine: DeepSpeedEngine) -> list[str]:
    """The learner (`Objective.learners`) that each flat tensor of `flat_masters` belongs to."""
    optimizer, groups = engine.optimizer, engine.optimizer.optimizer.param_groups
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = [groups[optimizer.sub_group_to_group_id[number]] for number in range(len(optimizer.fp16_groups))]
    return [group.get("learner", "") for group in groups]


def adam_steps(engine: DeepSpeedEngine) -> dict[str, int]:
    """Updates that Adam has made of each learner (fewer than steps when fp16 skipped some). Needs
    `create_adam_state`."""
    state, found = engine.optimizer.optimizer.state, {}
    for learner, flat in zip(learners(engine), flat_masters(engine), strict=True):
        step = int(state[flat]["step"])
        assert found.setdefault(learner, step) == step, f"groups of {learner!r} have made {step} and {found[learner]}"
    return found


def set_adam_steps(engine: DeepSpeedEngine, steps: Mapping[str, int]) -> None:
    """Set the number of updates in Adam's bias correction."""
    for learner, flat in zip(learners(engine), flat_masters(engine), strict=True):
        state = engine.optimizer.optimizer.state[flat]
        if isinstance(state["step"], Tensor):
            state["step"].fill_(steps[learner])
        else:
            state["step"] = steps[learner]


def set_master_weights(engine: DeepSpeedEngine, names: NamedParameters, weights: Mapping[str, Tensor]) -> None:
    """Make `weights` (canonical name → this rank's float32 weight) the master weights. Collective.

    DeepSpeed makes its masters from a model that it has rounded to low precision before.
    """
    for piece, flat, start in engine_fragments(engine, names):
        whole = weights[piece.name].flatten()
        flat.detach().narrow(0, start, piece.numel).copy_(whole.narrow(0, piece.offset, piece.numel))
    refresh_model_weights(engine)


def refresh_model_weights(engine: DeepSpeedEngine) -> None:
    """Make the model's own weights (of any precision) agree with the master weights. Collective.

    DeepSpeed does this after a step; nothing does it after the master weights were set by hand.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    persistent = optimizer.persistent_parameters
    if persistent:  # small parameters that stay whole: an all_gather skips them unless they were cut up before
        persistent[0].partition(persistent)
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    if persistent:
        persistent[0].all_gather(persistent)


def loss_scaler_state(engine: DeepSpeedEngine) -> dict[str, float | int] | None:
    """The counters of a dynamic loss scaler (fp16); None when the scale is fixed."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return {field: getattr(scaler, field) for field in SCALER_FIELDS}


def set_loss_scaler_state(engine: DeepSpeedEngine, state: dict[str, float | int] | None) -> None:
    """Restore `loss_scaler_state`; without one (from bf16 to fp16, say) the engine keeps its fresh scaler."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic and state is not None:
        for field in SCALER_FIELDS:
            setattr(scaler, field, state[field])
