"""Runs of one small model under any layout: tensor, pipeline and data parallel, ZeRO stage.

A run is what the pretraining command makes of what a user would type: its inputs, its start, its loop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from plain_run import LENGTH, MAX_GRAD_NORM, OPTIMIZER, ROWS, SEED, STEPS, Curve, architecture, warmup_steps
from small_dataset import SmallDataset

from deberta_xl.base.stop_request import StopRequest
from deberta_xl.checkpoint.store import load_checkpoint, save_checkpoint
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.commands.training_command import assemble
from deberta_xl.objectives import masked_evaluation, masked_lm
from deberta_xl.objectives.masked_evaluation import MaskedEvaluation
from deberta_xl.parallel import layers  # noqa: F401  (the forked ranks then need not import megatron-core)
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.deepspeed_config import SHIPPED_CONFIGS
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.recorder import Recorder


class Layout(NamedTuple):
    """How ranks share the model and the data."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def label(self) -> str:
        """Short, for test ids and folder names."""
        return f"tp{self.tensor}pp{self.pipeline}dp{self.data}"

    def join(self) -> Groups:
        """This rank's groups."""
        return build_groups(Grid.of(dist.get_rank(), dist.get_world_size(), self.tensor, self.pipeline))


class Case(NamedTuple):
    """One way to train in a layout."""

    stage: int = 1
    accumulation: int = 1
    recompute: bool = False
    precision: str = "fp32"
    """Or `bf16`, `bf16_fp32_sums` (BF16_Optimizer), `bf16_fp32_sums_at_once` (as `zero1_bf16.json` has it), `fp16`,
    `fp16_fp32_sums`."""
    offload: bool = False
    dropout: float = 0.0
    sliced: bool = False
    """Sequence parallelism beside tensor parallelism."""
    bias_correction: bool = True
    """False for the original's form of Adam."""
    objective: str = "masked_lm"
    shipped: str = ""
    """A file of `deepspeed_configs/`, which has stage and precision then."""

    @property
    def label(self) -> str:
        """Short, for folder names; no two cases have the same."""
        return "-".join(f"{name}={value}" for name, value in self._asdict().items())

    @property
    def optimizer(self) -> OptimizerSection:
        """The optimizer's settings."""
        return replace(OPTIMIZER, bias_correction=self.bias_correction)


def typed(name: str, settings: object) -> list[str]:
    """A section of the configuration as overrides of every key that is set."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return [f"{name}.{key}={str(value).lower()}" for key, value in values.items() if value is not None]


def overrides(dataset: SmallDataset, layout: Layout, case: Case, config: DebertaConfig) -> list[str]:
    """What makes a run that of a case in a layout."""
    return [
        *typed("model", replace(config, hidden_dropout=case.dropout, attention_dropout=case.dropout)),
        *typed("optimizer", case.optimizer),
        f"model.sequence_length={LENGTH}",
        f"data.train={dataset.train}",
        f"train.seed={SEED}",
        f"train.global_batch_size={ROWS}",
        f"train.micro_batch_size={ROWS // (layout.data * case.accumulation)}",
        f"train.max_grad_norm={MAX_GRAD_NORM}",
        f"train.activation_checkpointing={case.recompute}",
        f"train.objective={case.objective}",
        "train.log_interval=1",
        "schedule.decay=constant",
        f"parallel.tensor_parallel_size={layout.tensor}",
        f"parallel.pipeline_parallel_size={layout.pipeline}",
        f"parallel.sequence_parallel={case.sliced}",
    ]


def engine_settings(case: Case) -> dict[str, Any]:
    """The DeepSpeed JSON of a case. Small buckets, so that reductions come in several; nothing stays whole."""
    zero: dict = {"stage": case.stage, "reduce_bucket_size": 10_000}
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if case.offload:
        zero |= {"offload_optimizer": {"device": "cpu"}}
    precision, _, sums = case.precision.partition("_fp32_")
    if sums == "sums_at_once":
        zero["overlap_comm"] = True
    settings: dict = {"zero_optimization": zero}
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": sums == "sums_at_once"}
    if precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return settings | ({"data_types": {"grad_accum_dtype": "fp32"}} if sums else {})


def engine_file(case: Case, folder: Path) -> Path:
    """The shipped DeepSpeed JSON, or this rank's own in `folder`."""
    if case.shipped:
        return SHIPPED_CONFIGS / f"{case.shipped}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{case.label}-rank-{dist.get_rank()}.json"
    file.write_text(json.dumps(engine_settings(case)))
    return file


class Run:
    """A run of the small model on this rank of a layout, assembled by the pretraining command."""

    def __init__(
        self,
        dataset: SmallDataset,
        folder: Path,
        layout: Layout,
        case: Case,
        config: DebertaConfig,
        steps: int = STEPS,
        words: Sequence[str] = (),
    ):
        """`folder` is the run's own; with a checkpoint in it the run goes on. `words` are further overrides."""
        if "fp16" in case.precision + case.shipped:
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True  # the CPU can, slowly; DeepSpeed wants hardware for it
        engine = str(engine_file(case, folder.parent / "engines"))
        length = [f"train.steps={steps}", f"schedule.warmup_steps={warmup_steps(steps)}"]
        own = [f"run.folder={folder}", *overrides(dataset, layout, case, config), *length, *words]
        inputs = read_inputs(parse_arguments(["--config", "debug", "--deepspeed_config", engine, *own]))
        self.training = assemble(inputs, StopRequest())
        self.engine, self.grid = self.training.engine, inputs.grid

    @property
    def place(self) -> tuple[int, int]:
        """(size, rank) in the tensor-parallel group."""
        return self.grid.tensor_parallel_size, self.grid.tensor_parallel_rank

    def save(self, checkpoints: Path, step: int) -> Path:
        """A checkpoint of the state as it is, under a path of the caller's."""
        return save_checkpoint(self.engine, checkpoints, {"step": step}, extra_files={}, tensor_parallel=self.place)

    def load(self, folder: Path) -> dict:
        """The state of a checkpoint, in the engine that has run."""
        return load_checkpoint(self.engine, folder, tensor_parallel=self.place)

    def train(self, after_step: Callable[[], None] = lambda: None) -> Curve:
        """To the last step; the curve as this rank's recorder has it. `after_step` comes before anything is saved."""
        with recorded(after_step) as curve:
            self.training.train()
        return curve


@contextmanager
def recorded(after_step: Callable[[], None]) -> Iterator[Curve]:
    """Notes what the recorder of this rank makes of each step."""
    curve, interval_metrics = Curve([], []), Recorder.interval_metrics

    def noted(recorder: Recorder, *given: Any) -> dict[str, float | None]:
        values = interval_metrics(recorder, *given)
        curve.losses.append(values["loss"])
        curve.norms.append(next(values[name] for name in ("grad_norm", "discriminator_grad_norm") if name in values))
        after_step()
        return values

    with mock.patch.object(Recorder, "interval_metrics", noted):
        yield curve


def run_cases(
    dataset: SmallDataset,
    root: Path,
    layout: Layout,
    cases: list[Case],
    options: dict,
    steps: int = STEPS,
) -> list[Curve]:
    """Train every case on this rank from fresh weights, with a checkpoint after the first step."""
    config = architecture(**{"vocab_size": dataset.tokenizer.vocab_size} | options)
    curves = []
    for case in cases:
        run = Run(dataset, run_folder(root, layout, case), layout, case, config, steps)
        assert run.training.state.step == 0, "another test has used this folder"
        curves.append(run.train(partial(save_first, run)))
    return curves


def save_first(run: Run) -> None:
    """A checkpoint after step 1."""
    if run.training.state.step == 1:
        run.training.saver.save()


def evaluate_untrained(
    dataset: SmallDataset, folder: Path, layout: Layout, case: Case, config: DebertaConfig, max_samples: int
) -> MaskedEvaluation:
    """What the loop finds on this rank of held-out rows, under weights that no step changes."""
    words = ["optimizer.learning_rate=0", f"data.valid={dataset.valid}", "evaluation.interval=1"]
    run = Run(dataset, folder, layout, case, config, 2, [*words, f"evaluation.max_samples={max_samples}"])
    found = []

    def noted(*given: Any, **named: Any) -> MaskedEvaluation:
        found.append(masked_evaluation.evaluate_masked_lm(*given, **named))
        return found[-1]

    with mock.patch.object(masked_lm, "evaluate_masked_lm", noted):
        run.train()
    first, again = found
    assert first.loss == again.loss  # an evaluation leaves the engine able to train, and a step to evaluate
    return first


def run_folder(root: Path, layout: Layout, case: Case) -> Path:
    """Where a case is run."""
    return root / layout.label / case.label


def state_after_first_step(root: Path, layout: Layout, case: Case) -> Path:
    """The checkpoint of a case that `run_cases` has trained."""
    return run_folder(root, layout, case) / "checkpoints" / "step-00000001"
