"""What may stand in a DeepSpeed JSON: strict models of every section.

DeepSpeed 0.19 itself accepts an unknown top-level key, or `"enabled": "yes"`, without a word. Here each key has a type;
one that this package does not pass on is refused rather than ignored (`deepspeed_refused.py` says why).
`deepspeed_config.py` reads the file and words the errors. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from deberta_xl.base.errors import ConfigError

Value = TypeVar("Value")


def without_auto(value: Any) -> Any:
    """None for "auto": both leave a fact to the run configuration."""
    return None if value == "auto" else value


def whole_number(value: Any) -> Any:
    """5e8 as the integer it means: DeepSpeed's own examples write sizes that way."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Restated = Annotated[Value | None, BeforeValidator(without_auto)]
"""A fact whose home is the run configuration: absent, "auto", or in agreement with it."""
Count = Annotated[int, BeforeValidator(whole_number), Field(ge=0)]
"""A number of elements."""
Size = Annotated[Count, Field(gt=0)]
"""A number of elements, at least one."""


class Section(BaseModel):
    """An object of the JSON: unknown keys and mistyped values are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Offload(Section):
    """`offload_optimizer` and `offload_param`: what rests in the host's memory."""

    device: Literal["cpu", "none"] = "none"
    pin_memory: bool = True


class ZeroOptimization(Section):
    """`zero_optimization`: what is partitioned over the data-parallel ranks, and in what portions it travels."""

    stage: int
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Size = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Size = 500_000_000
    overlap_comm: bool | None = None
    round_robin_gradients: bool = False
    ignore_unused_parameters: bool = True
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    sub_group_size: Count = 1_000_000_000
    stage3_prefetch_bucket_size: Count = 50_000_000
    stage3_param_persistence_threshold: Count = 100_000
    stage3_model_persistence_threshold: Count = 2**63 - 1
    stage3_max_live_parameters: Count = 1_000_000_000
    stage3_max_reuse_distance: Count = 1_000_000_000
    stage3_module_granularity_threshold: Count = 0
    memory_efficient_linear: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False

    @field_validator("stage")
    @classmethod
    def check_stage(cls, stage: int) -> int:
        """Refuse stage 0: its low-precision optimizer makes an Adam step with zero gradients when it is built."""
        if stage == 0:
            raise ConfigError(
                "ZeRO stage 0 is refused: in low precision it makes a dummy Adam step, which falsifies the bias "
                "correction, and in fp32 it reports no gradient norm; use stage 1, which on one rank partitions nothing"
            )
        if stage not in (1, 2, 3):
            raise ConfigError("there is no such ZeRO stage; choose 1, 2 or 3")
        return stage

    @field_validator("round_robin_gradients")
    @classmethod
    def check_round_robin(cls, value: bool) -> bool:
        """Refuse the option that makes DeepSpeed's map from parameters to addresses wrong."""
        if value:
            raise ConfigError(
                "it makes DeepSpeed's address map of the parameters wrong, so checkpoints would mix them up; remove it"
            )
        return value

    @model_validator(mode="after")
    def check_stage_three(self) -> ZeroOptimization:
        """Refuse what only stage 3 reads in the other stages, where it would have no effect."""
        only_in_three = {"offload_param", "sub_group_size", "memory_efficient_linear"}
        idle = [k for k in self.model_fields_set if k.startswith("stage3_") or k in only_in_three]
        if idle and self.stage != 3:
            raise ConfigError(f"{', '.join(sorted(idle))}: read by stage 3 only, but stage={self.stage}; remove it")
        return self


class BFloat16(Section):
    """`bf16`: weights, activations and gradients in bfloat16, float32 master weights in the optimizer."""

    enabled: bool = False
    check_grad_overflow: bool = True
    immediate_grad_update: bool = False


class Float16(Section):
    """`fp16`: the same in float16, with a loss scale (0 = dynamic)."""

    enabled: bool = False
    loss_scale: float = Field(0, ge=0)
    initial_scale_power: int = Field(16, ge=0, le=32)
    loss_scale_window: int = Field(1000, ge=1)
    hysteresis: int = Field(2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: int = Field(1, ge=1)


class DataTypes(Section):
    """`data_types`: in what the micro-batches' gradients are summed; the model's own precision when unset."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None


class CommsLogger(Section):
    """`comms_logger`: a record of every collective."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default_factory=list)
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(Section):
    """`flops_profiler`: DeepSpeed's count of operations, once, at `profile_step`."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=1)
    module_depth: int = -1
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class OptimizerParams(Section):
    """`optimizer.params`: facts of the run's `optimizer` section."""

    lr: Restated[float] = None
    betas: Restated[list[float]] = None
    eps: Restated[float] = None
    weight_decay: Restated[float] = None
    bias_correction: Restated[bool] = None
    adam_w_mode: Literal[True] | None = None
    torch_adam: Literal[True] | None = None


class Optimizer(Section):
    """`optimizer`: only a restatement; the run builds its own AdamW."""

    type: Literal["AdamW", "Adam"]
    params: OptimizerParams = OptimizerParams()


class SchedulerParams(Section):
    """`scheduler.params`: facts of the run's `schedule` section."""

    warmup_num_steps: Restated[int] = None
    total_num_steps: Restated[int] = None
    warmup_max_lr: Restated[float] = None
    warmup_min_lr: Restated[float] = None
    warmup_type: Restated[str] = None
    warmup_min_ratio: Restated[float] = None
    cos_min_ratio: Restated[float] = None


class Scheduler(Section):
    """`scheduler`: only a restatement; the run builds its own schedule."""

    type: Restated[Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]] = None
    params: SchedulerParams = SchedulerParams()


class EngineSettings(Section):
    """The whole JSON."""

    zero_optimization: ZeroOptimization
    bf16: BFloat16 = BFloat16()
    fp16: Float16 = Float16()
    data_types: DataTypes = DataTypes()
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In what gradients are summed over ranks. DeepSpeed's own default is the precision: a running sum in bfloat16
    stops growing where an addend is below half its last place, and one in float16 overflows."""
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    steps_per_print: int | None = Field(None, ge=1)
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    zero_allow_untested_optimizer: Literal[True] = True
    zero_force_ds_cpu_optimizer: Literal[False] = False
    train_batch_size: Restated[int] = None
    train_micro_batch_size_per_gpu: Restated[int] = None
    gradient_accumulation_steps: Restated[int] = None
    gradient_clipping: Restated[float] = None
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """What weights and activations are computed in."""
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"

    @model_validator(mode="after")
    def check_precisions(self) -> EngineSettings:
        """Refuse two precisions at once, and data types that do not go with the one chosen."""
        if self.bf16.enabled and self.fp16.enabled:
            raise ConfigError("bf16.enabled and fp16.enabled are both true; choose one precision")
        accumulation = self.data_types.grad_accum_dtype
        if accumulation not in (None, "fp32", self.precision):
            raise ConfigError(
                f"data_types.grad_accum_dtype={accumulation!r} does not go with {self.precision}; "
                f"choose {' or '.join(sorted({'fp32', self.precision}))}"
            )
        if self.communication_data_type == "fp16" and self.precision != "fp16":
            raise ConfigError(
                f"communication_data_type='fp16' would overflow the unscaled gradients of {self.precision}; "
                "choose fp32 or bf16"
            )
        return self
