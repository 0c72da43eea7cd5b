"""Runs of one small model under any layout (tensor, pipeline and data parallel, ZeRO stage), and the plain run.

What is compared: loss and gradient norm of every step; the gradient of every parameter, as Adam's first moment after
one step, m = (1 − β1) g (arXiv 1412.6980), read from a checkpoint; Adam's second moment and the weights come with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from small_dataset import SmallDataset
from test_checkpoint_layouts import FullState
from torch import Tensor

from deberta_xl.architecture import DebertaConfig
from deberta_xl.checkpoint.fragments import canonical_parameters, set_master_weights
from deberta_xl.checkpoint.store import load_checkpoint, save_checkpoint
from deberta_xl.config import DataSection, OptimizerSection, RunConfig, TrainSection
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import masked_lm_parts
from deberta_xl.objectives.masked_lm import MaskedLM
from deberta_xl.objectives.objective import Sums
from deberta_xl.objectives.rows import MaskedRows, step_batches
from deberta_xl.parallel import layers  # noqa: F401  (the forked ranks then need not import megatron-core)
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.parallel.pipeline import PipelinedModel, build_stage
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.stages import split_model
from deberta_xl.training.engine import build_engine, gradient_norm, set_learning_rate
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.optimizer import build_optimizer
from deberta_xl.training.ownership import Ownership
from deberta_xl.training.pipelined import run_pipeline_step
from deberta_xl.training.step import even_shares, micro_batch_keys, run_step
from deberta_xl.training.timing import StepTimer

ROWS, LENGTH, STEPS = 8, 48, 10
OPTIMIZER = OptimizerSection(learning_rate=2e-3)
MAX_GRAD_NORM = 1.0


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

    @property
    def label(self) -> str:
        """Short, for messages and folder names."""
        marks = [self.precision, *(name for name in ("recompute", "offload", "sliced") if getattr(self, name))]
        return f"zero{self.stage}-x{self.accumulation}-{'-'.join(marks)}"


class Curve(NamedTuple):
    """Loss and gradient norm of every step."""

    losses: list[float]
    norms: list[float]


def architecture(vocab_size: int, **options: object) -> DebertaConfig:
    """Five layers with everything: convolution, buckets, shared projections; dropout off."""
    config = DebertaConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=5, num_heads=4, intermediate_size=64, position_buckets=8,
        max_position_embeddings=LENGTH, conv_kernel_size=3, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return replace(config, **options)


def rate(step: int) -> float:
    """Some schedule that changes at every step."""
    return OPTIMIZER.learning_rate * min(step / 5, 1.0)


def open_data(dataset: SmallDataset) -> PretrainingData:
    """The training rows."""
    return PretrainingData(TokenStore(dataset.train), dataset.tokenizer, DataSection(), LENGTH, seed=5)


def batches_from(
    dataset: SmallDataset, step: int, micro_batch_size: int, rank: int = 0, size: int = 1
) -> Iterator[list[MaskedRows]]:
    """The micro-batches of a data-parallel rank for the steps from `step` on."""
    data = open_data(dataset)
    train = TrainSection(global_batch_size=ROWS, micro_batch_size=micro_batch_size)
    return step_batches(data, train, (step - 1) * ROWS, MaskedRows.of, rank=rank, size=size)


def settings(case: Case, micro_batch_size: int) -> dict:
    """DeepSpeed's configuration of a case. Small buckets, so that reductions come in several; nothing stays whole."""
    zero: dict = {"stage": case.stage, "reduce_bucket_size": 10_000}
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if case.offload:
        zero |= {"offload_optimizer": {"device": "cpu"}}
    precision, _, sums = case.precision.partition("_fp32_")
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": sums == "sums_at_once"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 8},
    }
    return config | ({"data_types": {"grad_accum_dtype": "fp32"}} if sums else {})


class Run:
    """A run of the small model on this rank of a layout."""

    def __init__(
        self, dataset: SmallDataset, folder: Path, groups: Groups, case: Case, config: DebertaConfig, seed: int = 3
    ):
        self.dataset, self.groups, self.case = dataset, groups, case
        self.grid = groups.grid
        self.micro_batch_size = ROWS // (self.grid.data_parallel_size * case.accumulation)
        self.objective = MaskedLM(RunConfig(), config, dataset.tokenizer, open_data(dataset), None)
        self.engine = self.build(config, settings(case, self.micro_batch_size), seed)
        self.heartbeat = Heartbeat(folder, dist.get_rank(), Ownership(folder / "OWNER", "this test"))
        self.timer = StepTimer(self.engine.device)

    def build(self, config: DebertaConfig, engine_settings: dict, seed: int) -> deepspeed.DeepSpeedEngine:
        """The engine, as pretraining puts it together."""
        if self.case.precision.startswith("fp16"):
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True  # the CPU can, slowly; DeepSpeed wants hardware for it
        load = Load(self.micro_batch_size, LENGTH, 0.15 * self.micro_batch_size * LENGTH)
        split = split_model(masked_lm_parts(config), self.grid.num_stages, load)
        model = build_stage(config, split.units(self.grid.stage), seed)
        if self.case.recompute:
            model.checkpoint_activations()
        divide(model, self.groups, sequence_parallel=self.case.sliced)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        module = PipelinedModel(model, split, self.groups) if self.grid.num_stages > 1 else model
        engine = build_engine(module, OPTIMIZER, engine_settings, self.groups)
        set_master_weights(engine, canonical_parameters(engine), weights)
        return engine

    @property
    def place(self) -> tuple[int, int]:
        """(size, rank) in the tensor-parallel group."""
        return self.grid.tensor_parallel_size, self.grid.tensor_parallel_rank

    def save(self, checkpoints: Path, step: int) -> Path:
        """A checkpoint, under a path of the caller's."""
        return save_checkpoint(self.engine, checkpoints, {"step": step}, extra_files={}, tensor_parallel=self.place)

    def load(self, folder: Path) -> dict:
        """Continue from a checkpoint."""
        return load_checkpoint(self.engine, folder, tensor_parallel=self.place)

    def train(self, first: int, last: int, after_step: Callable[[int], None] = lambda step: None) -> Curve:
        """Steps `first` to `last` (inclusive)."""
        grid = self.grid
        batches = batches_from(
            self.dataset, first, self.micro_batch_size, grid.data_parallel_rank, grid.data_parallel_size
        )
        curve = Curve([], [])
        self.engine.train()
        for step in range(first, last + 1):
            result = self.step(step, next(batches))
            curve.losses.append(global_loss(result, self.groups))
            curve.norms.append(gradient_norm(self.engine))
            after_step(step)
        return curve

    def step(self, step: int, micro_batches: list[MaskedRows]) -> Sums:
        """One step as the loop makes it."""
        counted = sum(batch.counts[0] for batch in micro_batches) if self.grid.counts_labels else 0
        num_labels = torch.tensor(counted)
        dist.all_reduce(num_labels)
        set_learning_rate(self.engine, rate(step))
        shares = even_shares({"labels": int(num_labels)}, len(micro_batches), self.grid.data_parallel_size)
        keys = micro_batch_keys(7, step, len(micro_batches), self.grid)
        common = {"heartbeat": self.heartbeat, "timer": self.timer}
        if self.grid.num_stages > 1:
            return run_pipeline_step(self.engine, self.objective, micro_batches, shares, keys, **common)
        reports = self.objective.reports
        return run_step(self.engine, self.objective.losses, micro_batches, shares, keys, reports=reports, **common)


def global_loss(result: Sums, groups: Groups) -> float:
    """A step's loss over all replicas, as the recorder sums it."""
    loss = result["loss"].detach().double() if groups.grid.reports_results else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(loss)
    return loss.item() / groups.grid.data_parallel_size


def run_cases(
    dataset: SmallDataset, root: Path, layout: Layout, cases: list[Case], options: dict, steps: int = STEPS
) -> list[Curve]:
    """Train every case on this rank from fresh weights, with a checkpoint after the first step."""
    groups = layout.join()
    curves = []
    for case in cases:
        dropout = {"hidden_dropout": case.dropout, "attention_dropout": case.dropout}
        config = architecture(**{"vocab_size": dataset.tokenizer.vocab_size} | dropout | options)
        run = Run(dataset, root, groups, case, config)
        checkpoints = root / layout.label / case.label
        curves.append(run.train(1, steps, partial(save_first, run, checkpoints)))
        run.heartbeat.close()
    return curves


def save_first(run: Run, checkpoints: Path, step: int) -> None:
    """A checkpoint after step 1."""
    if step == 1:
        run.save(checkpoints, step)


def train_plainly(dataset: SmallDataset, config: DebertaConfig, steps: int = STEPS) -> tuple[Curve, FullState]:
    """The reference: one process, one forward per step, torch's AdamW and clipping; the state after step 1."""
    model = MaskedLanguageModel(config, seed=3)
    optimizer = build_optimizer(model, OPTIMIZER)
    batches = batches_from(dataset, 1, ROWS)
    curve, state = Curve([], []), {}
    for step in range(1, steps + 1):
        (batch,) = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        loss = model(batch.input_ids_BS, batch.segments_BS, labels=batch.labelled).loss
        loss.backward()
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        curve.losses.append(loss.item())
        if step == 1:
            moments = {kind: {n: optimizer.state[p][kind].clone() for n, p in model.named_parameters()}
                       for kind in ("exp_avg", "exp_avg_sq")}  # fmt: skip
            state = moments | {"master": {n: p.detach().clone() for n, p in model.named_parameters()}}
    return curve, state


def assert_equal_curves(actual: Curve, expected: Curve, what: object, loss: float = 1e-5, norm: float = 1e-5) -> None:
    """Losses and gradient norms of every step agree, relatively. In float32: the same sums in other orders."""
    for name, tolerance in (("losses", loss), ("norms", norm)):
        torch.testing.assert_close(
            torch.tensor(getattr(actual, name)), torch.tensor(getattr(expected, name)[: len(actual.losses)]),
            rtol=tolerance, atol=0, msg=lambda text, name=name: f"{name} of {what}: {text}",
        )  # fmt: skip


def assert_equal_gradients(actual: FullState, expected: FullState, what: object, tolerance: float = 1e-5) -> None:
    """Every gradient agrees: ‖Δ‖ ≤ tolerance·‖g‖ + 1e-7·global norm (some gradients are mathematically zero)."""
    gradients: dict[str, Tensor] = expected["exp_avg"]
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert actual["exp_avg"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (actual["exp_avg"][name] - gradient).norm()
        assert difference <= tolerance * gradient.norm() + 1e-7 * total, (
            f"{name} of {what}: {difference:.3g} of {gradient.norm():.3g}"
        )
