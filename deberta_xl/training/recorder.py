"""Turns step results into metrics, and reads the device only on logged steps."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_xl.objectives.evaluation import Sums
from deberta_xl.objectives.objective import Mean, Objective, Ratio
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.host_group import host_group
from deberta_xl.planning.hardware import peak_flops
from deberta_xl.run.metrics import MetricsWriter
from deberta_xl.run.stragglers import NodeTimes
from deberta_xl.run.timing import StepTimer
from deberta_xl.settings.pretraining import TrainSection
from deberta_xl.training.divergence import Explosion, SkippedSteps
from deberta_xl.training.engine import highest_memory, loss_scale
from deberta_xl.training.state import TrainState


class Recorder:
    """Sums step results on the device; every `train.log_interval` steps reduces them over the ranks and writes.

    What the objective reports is the mean of the steps since the last logged one (of those that its loss counts: where
    none of them does, logging waits for the next logged step), and so is the throughput; `grad_norm`, `learning_rate`,
    the step's time and its split are the logged step's own.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        objective: Objective,
        train: TrainSection,
        total_steps: int,
        state: TrainState,
        grid: Grid,
        writer: MetricsWriter | None,
    ):
        """Collective."""
        self.engine, self.objective, self.grid, self.writer = engine, objective, grid, writer
        self.train, self.total_steps, self.state = train, total_steps, state
        self.reports, self.guessing = objective.reports, objective.guessing
        self.timer = StepTimer(engine.device)
        self.node_times = NodeTimes(host_group())
        self.peak = self.device_peak()
        self.explosion = Explosion(self.guessing.loss) if self.guessing else None
        self.skipped = SkippedSteps(state)
        self.norms: dict[str, float | Tensor] = {}
        """Gradient norm of the last step's updates, by their names among the metrics."""
        self.reset()

    def device_peak(self) -> float | None:
        """Peak FLOP/s of all ranks' devices together, where known."""
        if self.engine.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.engine.device))
        return peak and peak * dist.get_world_size()

    def reset(self) -> None:
        """Begin a new interval now."""
        self.sums = torch.zeros(len(self.reports), dtype=torch.float64, device=self.engine.device)
        self.num_steps = 0
        self.counts: Counter[str] = Counter()
        self.counted_steps: Counter[str] = Counter()
        """Steps that have any of a count."""
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of something other than training."""
        aside = time.perf_counter()
        yield
        self.start += time.perf_counter() - aside

    def is_logged(self, step: int) -> bool:
        """Whether a step's metrics are written: the first, every `log_interval`-th and the last."""
        return step == 1 or step % self.train.log_interval == 0 or step == self.total_steps

    def begin_step(self, step: int) -> None:
        """Before a step's data are asked for."""
        self.timer.begin_step(is_exact=self.is_logged(step))

    def updated(self, learner: str | None) -> None:
        """An update was made, of one learner or of all; its norm is not read yet."""
        self.norms[f"{learner}_grad_norm" if learner else "grad_norm"] = self.engine.get_global_grad_norm()

    def record(self, sums: Sums, counts: Mapping[str, int], rate: float) -> None:
        """Take in a finished step; collective on logged steps."""
        assert sums.keys() == self.reports.keys(), f"reports has {[*self.reports]}, losses gives only {[*sums]}"
        self.sums += torch.stack([sums[name].double() for name in self.reports])
        self.num_steps += 1
        self.counts.update(counts)
        self.counted_steps.update({name: count > 0 for name, count in counts.items()})
        step = self.state.step
        if self.writer is not None:
            self.writer.finish_step(step)
        if self.is_logged(step) and self.counted_steps[self.reports["loss"].count]:
            self.tell(step, self.interval_metrics() | {"learning_rate": rate})
            self.reset()

    def tell(self, step: int, values: dict[str, float | None]) -> None:
        """Write the metrics of a logged step, and what is alarming about them. Collective."""
        if self.grid.num_stages == 1:  # nodes with other stages have other work
            values |= self.node_times.metrics(step, self.timer.seconds["forward"])
        if self.writer is None:
            return
        self.writer.write(step, values)
        self.writer.show_step(step, values)
        self.skipped.tell(self.state, self.num_steps)
        if self.explosion and values[self.guessing.figure] is not None:
            self.explosion.check(step, values[self.guessing.figure])

    def interval_metrics(self) -> dict[str, float | None]:
        """All metrics of the interval that ends with this step. Collective."""
        split = self.timer.split()
        if not self.grid.reports_results:
            self.sums.zero_()  # the same replica's results are another rank's to tell
        dist.all_reduce(self.sums)
        seconds = time.perf_counter() - self.start
        consumed, per_sample = self.state.consumed_samples, self.objective.tokens_per_sample
        samples = self.num_steps * self.train.global_batch_size
        tokens = samples * per_sample if per_sample else self.counts["tokens"]
        return {
            **self.reported(),
            **{name: float(norm) for name, norm in self.norms.items()},
            "loss_scale": loss_scale(self.engine),
            "skipped_steps": self.state.skipped_steps,
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            **self.work(seconds),
            **split,
            **highest_memory(self.engine.device),
            "consumed_samples": consumed,
            "consumed_tokens": consumed * per_sample if per_sample else None,
            "epoch": consumed / self.objective.num_samples,
        }

    def reported(self) -> dict[str, float | None]:
        """The objective's figures, each by its denominator; None where the interval has nothing of it."""
        values: dict[str, float | None] = {}
        totals = dict(zip(self.reports, self.sums.tolist(), strict=True))
        for name, report in self.reports.items():
            if isinstance(report, Mean):
                steps = self.counted_steps[report.count]
                values[name] = totals[name] / (steps * self.grid.data_parallel_size) if steps else None
            elif isinstance(report, Ratio):
                values[name] = totals[name] / max(1, self.counts[report.count])
        return {**values, **self.objective.derived(totals)}

    def work(self, seconds: float) -> dict[str, float | None]:
        """Operations per second, and their share of the devices' peak, where either is known."""
        mean_counts = {name: count / self.num_steps for name, count in self.counts.items()}
        per_step = self.objective.step_flops(self.state.step, mean_counts)
        flops = per_step and per_step * self.num_steps / seconds
        utilization = flops / self.peak if flops and self.peak else None
        return {"model_flops_per_second": flops, "model_flops_utilization": utilization}
