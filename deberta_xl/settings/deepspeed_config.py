"""Reading the DeepSpeed JSON strictly, and turning it into what is handed to `deepspeed.initialize`.

The JSON holds the engine's own matters: ZeRO stage, precision, offload, communication. Batch sizes, optimizer, schedule
and clipping live in the run configuration; where the JSON states one of them too, it must be "auto" or agree.
Imports neither torch nor deepspeed, so that a mistake costs a second.
"""

from __future__ import annotations

import json
import logging
import math
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import rank_zero
from deberta_xl.settings.deepspeed_json import read_json_object
from deberta_xl.settings.deepspeed_refused import REFUSED
from deberta_xl.settings.deepspeed_schema import EngineSettings, Section
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import nearest
from deberta_xl.settings.pretraining import RunConfig

SHIPPED_CONFIGS = Path(__file__).parent.parent.parent / "deepspeed_configs"

SCHEDULERS = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant": "WarmupLR"}
"""`schedule.decay` in DeepSpeed's words."""

FACTS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.eps": "optimizer.epsilon",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.bias_correction": "optimizer.bias_correction",
    "scheduler.params.warmup_max_lr": "optimizer.learning_rate",
    "scheduler.params.warmup_num_steps": "schedule.warmup_steps",
    "scheduler.params.total_num_steps": "train.steps",
    "scheduler.params.cos_min_ratio": "schedule.final_ratio",
}
"""Keys of the JSON that repeat a key of the run configuration word for word (`facts_of` adds the translated ones)."""

NEVER = 10**12
"""Steps between two prints of DeepSpeed's own; the run has its own metrics."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A checked DeepSpeed JSON (`load_deepspeed_config` makes it)."""

    path: Path
    """Where it was read from."""
    settings: EngineSettings
    """Its contents."""

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3."""
        return self.settings.zero_optimization.stage

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """What weights and activations are computed in. Whether the device has it is checked when training starts."""
        return self.settings.precision

    @property
    def weight_bytes(self) -> int:
        """Of a number in that precision."""
        return 4 if self.precision == "fp32" else 2

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights, moments and gradients rest in the host's memory."""
        offload = self.settings.zero_optimization.offload_optimizer
        return offload is not None and offload.device == "cpu"

    @property
    def offloads_weights(self) -> bool:
        """Whether the weights rest there."""
        offload = self.settings.zero_optimization.offload_param
        return offload is not None and offload.device == "cpu"

    def agree(self, data_parallel_size: int, run: RunConfig | FinetuneConfig) -> None:
        """Check every fact that the JSON states too against the run configuration.

        Raises ConfigError with both values and both places, and when the batch arithmetic does not come out.
        """
        train = run.train
        steps = train.gradient_accumulation_steps(data_parallel_size)
        home = (
            f"train.global_batch_size={train.global_batch_size} / (train.micro_batch_size={train.micro_batch_size}"
            f" x {data_parallel_size} data-parallel ranks) = {steps}"
        )
        stated = self.settings.gradient_accumulation_steps
        check_fact(self.path, "gradient_accumulation_steps", stated, Fact(home, steps))
        check_facts(self.path, self.settings, run)

    def engine_dict(self, data_parallel_size: int, run: RunConfig | FinetuneConfig) -> dict[str, Any]:
        """What is handed to `deepspeed.initialize(config=...)`: the JSON with all facts of the run filled in.

        Optimizer and scheduler are left out, since training passes its own torch optimizer; with it DeepSpeed compiles
        nothing, offloaded or not. DeepSpeed's timer is off: it would wait for the device in every step.
        Raises ConfigError as `agree` does.
        """
        self.agree(data_parallel_size, run)
        filled_in = {
            "train_batch_size": run.train.global_batch_size,
            "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
            "gradient_accumulation_steps": run.train.gradient_accumulation_steps(data_parallel_size),
            "gradient_clipping": run.train.max_grad_norm,
            "communication_data_type": self.settings.communication_data_type,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": self.settings.steps_per_print or NEVER,
            "timers": {"throughput": {"enabled": False}},
        }
        return self.settings.model_dump(exclude_unset=True, exclude={"optimizer", "scheduler"}) | filled_in


def load_deepspeed_config(path: str | Path, run: RunConfig | FinetuneConfig) -> DeepSpeedConfig:
    """Read and check the JSON at `path`; facts it shares with `run` must agree.

    Raises ConfigError naming the key, what is allowed or nearest, and the file.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise ConfigError(f"--deepspeed_config {path}: no such file; {shipped_configs()}")
    tree = read_json_object(path)
    check_keys(path, tree, EngineSettings)
    try:
        settings = EngineSettings(**tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error.errors()[0])}") from None
    check_facts(path, settings, run)
    check_pipeline(path, settings, run)
    if settings.communication_data_type != "fp32":
        rank_zero(
            "%s: communication_data_type=%r: gradients are summed over ranks in that precision. In bf16 some 1 %% of "
            "them is lost on 128 ranks, and more beyond; in fp16 they may overflow. The default, fp32, does neither",
            path, settings.communication_data_type, level=logging.WARNING,
        )  # fmt: skip
    return DeepSpeedConfig(path, settings)


def shipped_configs() -> str:
    """A sentence on the files of the default folder."""
    names = sorted(path.name for path in SHIPPED_CONFIGS.glob("*.json"))
    return f"{SHIPPED_CONFIGS} has {', '.join(names)}" if names else "give the path of a DeepSpeed JSON"


# Checking: keys, then types, then agreement with the run.


def sections(model: type[Section]) -> dict[str, type[Section]]:
    """The keys of `model` that hold an object, with its model."""
    found = {}
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                found[name] = candidate
    return found


def check_keys(path: Path, tree: dict[str, Any], model: type[Section], parent: str = "") -> None:
    """Refuse unknown keys, at every level, with the nearest valid one, and DeepSpeed's unused ones with the reason."""
    for key, value in tree.items():
        name = parent + key
        if key not in model.model_fields:
            if name in REFUSED:
                raise ConfigError(f"{path}: {name} is not accepted here: {REFUSED[name]}")
            hint = elsewhere(key, parent) or nearest(key, model.model_fields)
            raise ConfigError(f"{path}: unknown key {name}; {hint}")
        if key in sections(model) and isinstance(value, dict):
            check_keys(path, value, sections(model)[key], f"{name}.")


def elsewhere(key: str, parent: str) -> str:
    """A hint when another section, or the top level, owns `key`."""
    owners = [name for name, model in sections(EngineSettings).items() if key in model.model_fields]
    owners += ["the top level"] if parent and key in EngineSettings.model_fields else []
    return f"{key} belongs to {', '.join(owners)}" if owners else ""


def describe(finding: dict[str, Any]) -> str:
    """One of pydantic's findings in a user's words."""
    name = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "missing":
        return f'{name} is missing; for example {{"zero_optimization": {{"stage": 1}}}}'
    cause = finding.get("ctx", {}).get("error")
    if cause is not None and isinstance(finding["input"], dict):
        return f"{name}: {cause}" if name else str(cause)
    given = f"{name}={json.dumps(finding['input'])}"
    if finding["type"] == "model_type":
        return f"{given} must be an object, {{...}}"
    return f"{given}: {cause}" if cause else f"{given} {finding['msg'].replace('Input should be', 'must be')}"


class Fact(NamedTuple):
    """What the run configuration says about a key of the JSON."""

    home: str
    """The run's own key and value, as a reader of the error needs them."""
    value: Any
    """The value the JSON would have to state."""


def facts_of(run: RunConfig | FinetuneConfig) -> dict[str, Fact]:
    """Dotted key of the JSON -> the fact of the run configuration that it would repeat."""
    facts = {}
    for name, home in FACTS.items():
        section, key = home.split(".")
        value = getattr(getattr(run, section), key)
        facts[name] = Fact(f"{home}={value!r}", value)
    decay, betas = run.schedule.decay, [run.optimizer.beta1, run.optimizer.beta2]
    facts["scheduler.type"] = Fact(f"schedule.decay={decay!r} ({SCHEDULERS[decay]})", SCHEDULERS[decay])
    facts["optimizer.params.betas"] = Fact(f"optimizer.beta1={betas[0]}, optimizer.beta2={betas[1]}", betas)
    warmup = "the linear warm-up from 0"
    facts["scheduler.params.warmup_type"] = Fact(warmup, "linear")
    facts["scheduler.params.warmup_min_lr"] = facts["scheduler.params.warmup_min_ratio"] = Fact(warmup, 0)
    return facts


def check_facts(path: Path, settings: EngineSettings, run: RunConfig | FinetuneConfig) -> None:
    """Refuse facts of the JSON that contradict the run configuration."""
    for name, fact in facts_of(run).items():
        stated: Any = settings
        for part in name.split("."):
            stated = getattr(stated, part, None)
        check_fact(path, name, stated, fact)


def check_pipeline(path: Path, settings: EngineSettings, run: RunConfig | FinetuneConfig) -> None:
    """Refuse gradients or parameters partitioned over ranks in a pipeline, which holds them for all micro-batches."""
    stage, stages = settings.zero_optimization.stage, run.parallel.pipeline_parallel_size
    if stages > 1 and stage != 1:
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage} does not go with parallel.pipeline_parallel_size={stages}: a "
            "pipeline sums the gradients of all micro-batches before it reduces them; use ZeRO stage 1 "
            f"(deepspeed_configs/zero1_bf16.json), or parallel.pipeline_parallel_size=1 to keep stage {stage}"
        )


def check_fact(path: Path, name: str, stated: Any, fact: Fact) -> None:
    """Refuse one fact, with both values and both places, unless it is unset or agrees."""
    if stated is not None and not same(stated, fact.value):
        raise ConfigError(
            f"{path}: {name}={json.dumps(stated)} contradicts the run configuration, which has {fact.home}; "
            'remove it here or write "auto", and set it there'
        )


def same(stated: Any, value: Any) -> bool:
    """Equality, for numbers up to rounding."""
    if isinstance(stated, list):
        return len(stated) == len(value) and all(map(same, stated, value))
    if isinstance(stated, float):
        return math.isclose(stated, value, rel_tol=1e-9)
    return stated == value
