"""The DeepSpeed engine: how it is started, built and asked.

Its other ways are known to training/step.py (how it is stepped), training/zero1/update.py (ZeRO-1's update),
parallel/pipeline.py and training/pipelined.py (its pipeline) and checkpoint/fragments.py (where it keeps the
optimizer's state). To all others it is a type with a device, some counters and a call.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import resource
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from deberta_xl.base.errors import ConfigError, Diverged
from deberta_xl.base.launch import Launch, device_number, ranks_of_node
from deberta_xl.base.log import logger
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.host_group import patience
from deberta_xl.parallel.pipeline import PipelinedModel
from deberta_xl.run.devices import device_name
from deberta_xl.run.rendezvous import export_launch
from deberta_xl.run.roll_call import all_ranks_here
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.optimizer import ONE_LEARNER, build_optimizer
from deberta_xl.training.zero1.update import PartitionedUpdate, is_for, portion_elements

LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Where DeepSpeed looks for the number of a rank's device; it refuses to start where both are there and differ."""


def start_engine_runtime(launch: Launch, precision: str, *, deterministic: bool) -> None:
    """Choose this rank's device and join the process group. Nothing is compiled: no operator is built just in time."""
    export_launch(launch)
    quieten_engine()
    # DeepSpeed still calls the collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Used by inference only, but compiled (50 s, needs g++ and ninja) whenever a process group is made on a CPU.
        # To ask for it probes every operator; on a GPU without CUDA's toolkit, where nothing needs it, each complains.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        share_cores(launch)
    else:
        take_device(device_number(launch.local_rank, accelerator.device_count()))
    if precision != "fp32" and accelerator.device_name() != "cpu":
        # For the float32 products of attention scores: TF32 holds every bit of the bf16 or fp16 values they are of.
        torch.set_float32_matmul_precision("high")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    backend = accelerator.communication_backend_name()
    with all_ranks_here(launch):
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=patience())


def take_device(number: int) -> None:
    """Make the visible device of this number this rank's, for DeepSpeed, too: it takes LOCAL_RANK for the number, and a
    launcher may show each rank its own device only (srun --gpus-per-task=1)."""
    get_accelerator().set_device(number)
    for variable in LOCAL_RANKS:
        if variable in os.environ:
            os.environ[variable] = str(number)


def quieten_engine() -> None:
    """Let DeepSpeed's warnings come as our own do, without those about what is tested here."""
    engine_logger = logging.getLogger("DeepSpeed")
    engine_logger.setLevel(logging.WARNING)
    engine_logger.handlers[:] = logger.handlers or engine_logger.handlers
    engine_logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())


def share_cores(launch: Launch) -> None:
    """Divide the cores among the ranks of this node, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_of_node(launch)))


def check_precision(precision: str) -> None:
    """Refuse a precision that the device does not have. Raises ConfigError."""
    accelerator = get_accelerator()
    is_gpu = accelerator.device_name() == "cuda"
    supported = {
        "fp32": True,
        # A GPU older than Ampere has bfloat16 only as float32 numbers that are cut, slower than those.
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if is_gpu else accelerator.is_bf16_supported(),
        "fp16": accelerator.is_fp16_supported(),
    }
    if not supported[precision]:
        allowed = ", ".join(name for name, is_supported in supported.items() if is_supported)
        raise ConfigError(f"{precision} is not supported on this device ({device_name()}); it has: {allowed}")


def build_engine(
    model: nn.Module,
    optimizer: OptimizerSection,
    settings: dict[str, Any],
    groups: Groups | None = None,
    learners: Mapping[str, float] = ONE_LEARNER,
) -> deepspeed.DeepSpeedEngine:
    """The engine around a model: plain, divided over `groups`, or a stage (`PipelinedModel`).

    `settings` is DeepSpeed's complete configuration; `learners` are as `Objective.learners` has them.
    """
    unit = groups.model_parallel_unit() if groups else None
    portion = portion_elements(settings)
    if isinstance(model, PipelinedModel):
        portion = None  # its sums are complete when all of its backward passes are over
        # DeepSpeed would cut what travels over the tensor-parallel ranks and gather it again at every border.
        settings = settings | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
    # Where layers are whole it would make a second group of all ranks, with a timeout of its own.
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
    # Some of DeepSpeed's optimizers print their memory use when they are built.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, optimizer, learners, portion),
            config=settings,
            mpu=unit,
            dist_init_required=False,
        )
    if is_for(settings):
        PartitionedUpdate.take_over(engine)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        read_norm_once(engine.optimizer)
    return engine


def read_norm_once(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Give ZeRO-2 the gradient's norm on the host: for each group of parameters it asks anew whether that is a number,
    and would wait for the device each time. Layers with rates of their own are dozens of groups."""
    norm = optimizer.scaled_global_norm
    optimizer.scaled_global_norm = lambda: norm().cpu()


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """The rate of the coming update; each parameter group learns at its share of it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["rate_share"]


class Turns:
    """Learners that take turns: an update in the turn of one leaves the parameters of all others alone.

    ZeRO-3's coordinator records the modules of a forward and backward pass; in the passes that follow it gathers their
    parameters ahead of use, until one goes another way and all of the record is dropped. Turns go different ways, so
    each learner has a coordinator of its own.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, learners: Iterable[str]):
        """Before the engine's first pass."""
        self.engine, optimizer = engine, engine.optimizer
        is_gathered = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
        self.offload = optimizer.parameter_offload if is_gathered else None
        """What gathers parameters, where that is needed."""
        self.coordinators = {name: unrecorded(self.offload.param_coordinator) for name in learners if self.offload}

    @contextlib.contextmanager
    def of(self, learner: str | None) -> Iterator[None]:
        """Updates made inside are of this learner's parameters alone; None is everyone's turn."""
        if learner is None:
            yield
            return
        optimizer = self.engine.optimizer
        optimizer.optimizer.learner = learner
        try:
            with self.gathering_for(learner) if self.offload else contextlib.nullcontext():
                yield
        finally:
            optimizer.optimizer.learner = None
        if self.offload:
            # ZeRO-3 writes each gradient over the one of the step before; where none comes, the old one would stay.
            optimizer.grad_partitions_flat_buffer.zero_()

    @contextlib.contextmanager
    def gathering_for(self, learner: str) -> Iterator[None]:
        """ZeRO-3's hooks ask the learner's coordinator inside, and afterwards everyone's again.

        Each counts the parameters that it holds, from none at the start of a pass: an update leaves none behind, but an
        evaluation may, which everyone's then lets go.
        """
        if any(is_held(parameter) for parameter in self.engine.module.parameters()):
            self.offload.partition_all_parameters()
        everyones = self.offload.param_coordinator
        self.offload.param_coordinator = self.coordinators[learner]
        try:
            yield
        finally:
            self.offload.param_coordinator = everyones


def is_held(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds all of a parameter, or is about to, that does not stay whole between updates anyway."""
    return parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE and not parameter.ds_persist


def unrecorded(coordinator: PartitionedParameterCoordinator) -> PartitionedParameterCoordinator:
    """Another one like it, which has recorded nothing yet either: its settings, stream and parameters in flight."""
    assert coordinator.is_invalid_trace(), "it has recorded a pass"
    fresh = copy.copy(coordinator)
    fresh._clear_trace_structures()  # the lists of the copy are the other's
    return fresh


@contextlib.contextmanager
def scaler_in_words() -> Iterator[None]:
    """Makes a user's error of the bare Exception with which DeepSpeed ends a search for fp16's loss scale."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise Diverged(
            "the gradient overflows float16 even at the lowest loss scale (fp16.min_loss_scale): loss or weights are "
            "not finite, or too large for fp16"
        ) from error


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Global norm of the last step's gradient, before clipping."""
    return float(engine.get_global_grad_norm())


def update_is_finite(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the last step's gradient was finite, on all ranks alike. DeepSpeed has waited for the answer already.

    Under `bf16.check_grad_overflow: false` it has not, so the norm is read, for which the device is waited for.
    """
    if engine.optimizer.overflow:
        return False
    if engine.bfloat16_enabled() and not getattr(engine.optimizer, "check_grad_overflow", True):
        norm = gradient_norm(engine)
        return math.isfinite(norm) and norm >= 0  # -1 is DeepSpeed's word for a norm that is none
    return True


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """The current loss scale in fp16, None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def highest_memory(device: torch.device) -> dict[str, float]:
    """`memory_peaks` of the ranks that needed most: stages and slices need not be alike. Collective."""
    peaks = memory_peaks()
    highest = torch.tensor([*peaks.values()], dtype=torch.float64, device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return dict(zip(peaks, highest.tolist(), strict=True))


def memory_peaks() -> dict[str, float]:
    """Peak memory of this process since the last call, GiB: on a GPU what its tensors took, and what was reserved for
    them; on a CPU its peak resident size."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    allocated, reserved = accelerator.max_memory_allocated(), accelerator.max_memory_reserved()
    accelerator.reset_peak_memory_stats()
    return {"memory_gib": allocated / 2**30, "reserved_memory_gib": reserved / 2**30}
