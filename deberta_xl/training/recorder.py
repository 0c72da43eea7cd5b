"""Turns step results into metrics, and reads the device only on logged steps."""

from __future__ import annotations

import time

import deepspeed
import torch
import torch.distributed as dist

from deberta_xl.architecture import DebertaConfig
from deberta_xl.config import RunConfig
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import masked_lm_parts
from deberta_xl.parallel.groups import Groups
from deberta_xl.planning.cost import step_flops
from deberta_xl.planning.hardware import peak_flops
from deberta_xl.training.divergence import Explosion, SkippedSteps
from deberta_xl.training.engine import StepResult, gradient_norm, highest_memory_gib, loss_scale
from deberta_xl.training.metrics import MetricsWriter
from deberta_xl.training.state import TrainState
from deberta_xl.training.stragglers import NodeTimes
from deberta_xl.training.timing import StepTimer


class Recorder:
    """Sums step results on the device; every `train.log_interval` steps reduces them over the ranks and writes.

    `loss` is the mean of the steps since the last logged one (of those with labels: where none of them has any,
    logging waits for the next logged step), and so are `accuracy` and the throughput; `grad_norm`, `learning_rate`, the
    step's time and its split are the logged step's own.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: RunConfig,
        architecture: DebertaConfig,
        state: TrainState,
        num_rows: int,
        groups: Groups,
        writer: MetricsWriter | None,
    ):
        self.engine, self.config, self.parts = engine, config, masked_lm_parts(architecture)
        self.num_rows, self.groups = num_rows, groups
        self.writer = writer
        self.timer = StepTimer(engine.device)
        self.node_times = NodeTimes(engine.device)
        self.peak = self.device_peak()
        self.explosion = Explosion(architecture.vocab_size)
        self.skipped = SkippedSteps(state)
        self.reset()

    def device_peak(self) -> float | None:
        """Peak FLOP/s of all ranks' devices together, where known."""
        if self.engine.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.engine.device))
        return peak and peak * dist.get_world_size()

    def reset(self) -> None:
        """Begin a new interval now; also after an evaluation or a checkpoint, whose time is not training's."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.num_steps = self.num_labelled_steps = self.num_labels = 0
        self.start = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` that went to something other than training."""
        self.start += seconds

    def is_logged(self, step: int) -> bool:
        """Whether a step's metrics are written: the first, every `log_interval`-th and the last."""
        train = self.config.train
        return step == 1 or step % train.log_interval == 0 or step == train.steps

    def begin_step(self, step: int) -> None:
        """Before a step's data are asked for."""
        self.timer.begin_step(is_exact=self.is_logged(step))

    def record(self, state: TrainState, result: StepResult, num_labels: int, rate: float) -> None:
        """Take in a finished step; collective on logged steps."""
        self.sums += torch.stack([result.loss.double(), result.num_correct.double()])
        self.num_labels += num_labels
        self.num_steps += 1
        self.num_labelled_steps += num_labels > 0
        if self.writer is not None:
            self.writer.finish_step(state.step)
        if self.is_logged(state.step) and self.num_labelled_steps:
            values = self.interval_metrics(state) | {"learning_rate": rate}
            if self.groups.grid.num_stages == 1:  # nodes with other stages have other work
                values |= self.node_times.metrics(state.step, self.timer.seconds["forward"])
            if self.writer is not None:
                self.writer.write(state.step, values)
                self.writer.show_step(state.step, values)
                self.skipped.tell(state, self.num_steps)
                self.explosion.check(state.step, values["loss"])
            self.reset()

    def interval_metrics(self, state: TrainState) -> dict[str, float | None]:
        """All metrics of the interval that ends with this step. Collective."""
        split = self.timer.split()
        if not self.groups.grid.reports_results:
            self.sums.zero_()  # the same replica's results are another rank's to tell
        dist.all_reduce(self.sums)
        loss_sum, num_correct = self.sums.tolist()
        seconds = time.perf_counter() - self.start
        train, length = self.config.train, self.config.model.sequence_length
        samples = self.num_steps * train.global_batch_size
        labels_per_step = self.num_labels / self.num_steps
        flops_per_step = step_flops(self.parts, Load(train.global_batch_size, length, labels_per_step))
        flops = flops_per_step * self.num_steps / seconds
        return {
            "loss": loss_sum / (self.num_labelled_steps * self.groups.grid.data_parallel_size),
            "accuracy": num_correct / max(1, self.num_labels),
            "grad_norm": gradient_norm(self.engine),
            "loss_scale": loss_scale(self.engine),
            "skipped_steps": state.skipped_steps,
            "tokens_per_second": samples * length / seconds,
            "samples_per_second": samples / seconds,
            "model_flops_per_second": flops,
            "model_flops_utilization": flops / self.peak if self.peak else None,
            **split,
            "memory_gib": highest_memory_gib(self.engine.device),
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_samples * length,
            "epoch": state.consumed_samples / self.num_rows,
        }
