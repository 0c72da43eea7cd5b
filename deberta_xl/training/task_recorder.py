"""Turns the steps of a fine-tuning run into metrics, and reads the device only on logged steps."""

from __future__ import annotations

import time

import deepspeed
import torch
import torch.distributed as dist

from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.parallel.groups import Groups
from deberta_xl.training.divergence import SkippedSteps
from deberta_xl.training.engine import gradient_norm, highest_memory_gib, loss_scale
from deberta_xl.training.metrics import MetricsWriter
from deberta_xl.training.task_state import TaskState
from deberta_xl.training.task_step import TaskLosses
from deberta_xl.training.timing import StepTimer


class TaskRecorder:
    """Sums step results on the device; every `train.log_interval` steps reduces them over the ranks and writes."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: FinetuneConfig,
        state: TaskState,
        num_features: int,
        total_steps: int,
        groups: Groups,
        writer: MetricsWriter | None,
    ):
        self.engine, self.config, self.groups, self.writer = engine, config, groups, writer
        self.num_features, self.total_steps = num_features, total_steps
        self.timer = StepTimer(engine.device)
        self.skipped = SkippedSteps(state)
        self.reset()

    def reset(self) -> None:
        """Begin a new interval now."""
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        self.num_steps = self.num_labelled_steps = 0
        self.start = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` that went to something other than training."""
        self.start += seconds

    def is_logged(self, step: int) -> bool:
        """Whether a step's metrics are written: the first, every `log_interval`-th and the last."""
        return step == 1 or step % self.config.train.log_interval == 0 or step == self.total_steps

    def begin_step(self, step: int) -> None:
        """Before a step's data are asked for."""
        self.timer.begin_step(is_exact=self.is_logged(step))

    def record(self, state: TaskState, losses: TaskLosses, num_tokens: int, rate: float, *, has_labels: bool) -> None:
        """Take in a finished step, in which this rank read `num_tokens`; collective on logged steps.

        Losses are means of the steps with labels; where none had any, logging waits for the next logged step.
        """
        tokens = torch.tensor(num_tokens, dtype=torch.float64, device=self.engine.device)
        self.sums += torch.stack([*(loss.double() for loss in losses), tokens])
        self.num_steps += 1
        self.num_labelled_steps += has_labels
        if self.writer is not None:
            self.writer.finish_step(state.step)
        if self.is_logged(state.step) and self.num_labelled_steps:
            values = self.interval_metrics(state) | {"learning_rate": rate}
            if self.writer is not None:
                self.writer.write(state.step, values)
                self.writer.show_step(state.step, values)
                self.skipped.tell(state, self.num_steps)
            self.reset()

    def interval_metrics(self, state: TaskState) -> dict[str, float | None]:
        """All metrics of the interval that ends with this step. Collective."""
        split = self.timer.split()
        dist.all_reduce(self.sums, group=self.groups.data_group)
        total, task, adversarial, tokens = self.sums.tolist()
        seconds = time.perf_counter() - self.start
        steps = self.num_labelled_steps * self.groups.grid.data_parallel_size
        return {
            "loss": total / steps,
            "task_loss": task / steps,
            "adversarial_loss": adversarial / steps if self.config.sift.weight else None,
            "grad_norm": gradient_norm(self.engine),
            "loss_scale": loss_scale(self.engine),
            "skipped_steps": state.skipped_steps,
            "tokens_per_second": tokens / seconds,
            "samples_per_second": self.num_steps * self.config.train.global_batch_size / seconds,
            **split,
            "memory_gib": highest_memory_gib(self.engine.device),
            "consumed_samples": state.consumed_samples,
            "epoch": state.consumed_samples / self.num_features,
        }
