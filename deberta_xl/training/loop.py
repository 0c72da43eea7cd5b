"""The loop of every run, whatever it learns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import deepspeed
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import Launch
from deberta_xl.base.log import rank_zero
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.data.loader import prefetch
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.objectives.evaluation import Sums
from deberta_xl.objectives.micro_batch import MicroBatch, pinned
from deberta_xl.objectives.objective import KeepsBest, Losses, Objective, Reports
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.host_group import host_group
from deberta_xl.run.garbage import collected_by_steps
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.metrics import MetricsWriter
from deberta_xl.run.ownership import Ownership
from deberta_xl.run.profiling import StepProfiler
from deberta_xl.run.run_folder import RunFolder, State
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.pretraining import RunConfig, ScheduleSection
from deberta_xl.training.agreement import Agreement, Question, StopRequested
from deberta_xl.training.empty_steps import EmptySteps
from deberta_xl.training.engine import Turns, scaler_in_words, set_learning_rate, update_is_finite
from deberta_xl.training.evaluating import Evaluations
from deberta_xl.training.pipelined import run_pipeline_step
from deberta_xl.training.recorder import Recorder
from deberta_xl.training.safeguard import Safeguard
from deberta_xl.training.saving import Saver
from deberta_xl.training.schedule import learning_rate
from deberta_xl.training.state import TrainState
from deberta_xl.training.step import even_shares, micro_batch_keys, run_step

STEPS_AHEAD = 2
"""Steps whose batches are prepared in the background."""


@dataclass
class Training:
    """A run, assembled: what the loop works with."""

    config: RunConfig | FinetuneConfig
    objective: Objective
    total_steps: int
    schedule: ScheduleSection
    launch: Launch
    groups: Groups
    engine: deepspeed.DeepSpeedEngine
    folder: RunFolder
    state: TrainState
    heartbeat: Heartbeat
    ownership: Ownership
    safeguard: Safeguard
    stop: StopRequest
    writer: MetricsWriter | None = field(init=False)
    """The metrics of the run, on rank 0."""
    recorder: Recorder = field(init=False)
    agreement: Agreement = field(init=False)
    saver: Saver = field(init=False)
    evaluations: Evaluations = field(init=False)
    empty_steps: EmptySteps = field(init=False)
    profiler: StepProfiler = field(init=False)
    turns: Turns = field(init=False)
    is_finite: bool = field(init=False)
    """Whether all updates of the last step had finite gradients."""
    left_out: list[str] = field(init=False)
    """Learners whose own update in that step had none."""

    def train(self) -> State:
        """Train to the last step or until asked to stop; how it ended. Collective."""
        self.begin()
        with collected_by_steps() as collect:
            self.make_steps(collect)
        return self.end()

    def make_steps(self, collect: Callable[[int], None]) -> None:
        """The loop. `collect` is told of every step, when it is done. Collective."""
        steps = self.agreed_steps()
        while not self.is_finished:
            step = self.state.step + 1
            self.heartbeat.mark(step, "data")
            self.recorder.begin_step(step)
            with self.recorder.timer.phase("data"):
                micro_batches, counts = next(steps)
            if self.agreement.is_stopping:
                break
            self.empty_steps.check(step, counts[self.objective.reports["loss"].count])
            self.profiler.before_step(step)
            sums = self.step(step, micro_batches, counts)
            self.state.advance(self.config.train.global_batch_size, is_finite=self.is_finite, left_out=self.left_out)
            self.recorder.record(sums, counts, self.learning_rate(step))
            self.profiler.after_step(step)
            self.safeguard.after_step()
            if self.is_last:  # before its evaluation, which takes in no weights that may not be saved
                self.safeguard.check_end(searches_scale=self.engine.fp16_enabled())
            with self.recorder.paused():
                self.save_and_evaluate()
            collect(step)

    def begin(self) -> None:
        """Open the metrics, and make the evaluation that the start before has left unfinished. Collective."""
        self.writer = self.open_metrics()
        train, grid, state = self.config.train, self.groups.grid, self.state
        self.recorder = Recorder(self.engine, self.objective, train, self.total_steps, state, grid, self.writer)
        self.agreement = Agreement()
        self.saver = Saver(
            self.engine, self.objective, grid, self.folder, state, self.safeguard, self.heartbeat, self.ownership
        )
        self.evaluations = Evaluations(
            self.engine, self.objective, self.groups, self.folder, state, self.heartbeat, self.agreement, self.stop,
            self.writer,
        )  # fmt: skip
        self.empty_steps = EmptySteps(self.total_steps, self.objective.nothing_to_learn)
        self.profiler = StepProfiler(train.profile_steps(), self.folder.profile, self.launch.rank)
        self.turns = Turns(self.engine, self.objective.learners)
        self.stop.training_begins()
        self.engine.train()
        is_owed = self.evaluations.is_due(is_last=self.is_last) and not self.evaluations.was_made()
        if is_owed and self.evaluations.make():
            self.saver.save()

    def open_metrics(self) -> MetricsWriter | None:
        """The metrics of the run, on rank 0."""
        if self.launch.rank != 0:
            return None
        return MetricsWriter(
            self.folder.metrics,
            self.folder.tensorboard,
            first_step=self.state.step,
            total_steps=self.total_steps,
            ownership=self.ownership,
        )

    @property
    def is_last(self) -> bool:
        """Whether the last step is made."""
        return self.state.step >= self.total_steps

    @property
    def is_finished(self) -> bool:
        """Whether the last step is made, or waiting longer is of no use."""
        patience = self.objective.patience if isinstance(self.objective, KeepsBest) else 0
        return self.is_last or self.state.has_waited(patience)

    def batches(self) -> Iterator[Sequence[MicroBatch]]:
        """This rank's micro-batches for every step from here on."""
        grid, state = self.groups.grid, self.state
        batches = self.objective.batches(
            state.step + 1, state.consumed_samples, rank=grid.data_parallel_rank, size=grid.data_parallel_size
        )
        is_gpu = self.engine.device.type == "cuda"
        return ([pinned(batch) for batch in of_step] for of_step in batches) if is_gpu else batches

    def agreed_steps(self) -> Iterator[tuple[Sequence[MicroBatch], dict[str, int]]]:
        """This rank's micro-batches for every step from here on, with what the global batch counts. Collective.

        The ranks begin to agree on a step before the one in front of it is made, and hear of it afterwards.
        """
        batches = prefetch(self.batches(), STEPS_AHEAD)
        micro_batches = next(batches)
        question = self.ask(micro_batches)
        while True:
            counts = dict(zip(self.objective.counts, self.agreement.hear(question), strict=True))
            current = micro_batches
            if not self.agreement.is_stopping and self.state.step + 1 < self.total_steps:
                micro_batches = next(batches)
                question = self.ask(micro_batches)
            yield current, counts

    def ask(self, micro_batches: Sequence[MicroBatch]) -> Question:
        """Begin to agree on a step: what its global batch counts, and whether to stop before it. Collective."""
        names = self.objective.counts
        counted = [sum(of_each) for of_each in zip(*(batch.counts for batch in micro_batches), strict=True)]
        if len(counted) != len(names):
            raise ConfigError(
                f"a micro-batch has {len(counted)} counts, the objective's counts are {len(names)}: {', '.join(names)}"
            )
        # The ranks that share a replica see the same samples; one of them counts.
        counted = counted if self.groups.grid.counts_labels else [0] * len(names)
        return self.agreement.ask(counted, self.stop)

    def step(self, step: int, micro_batches: Sequence[MicroBatch], counts: Mapping[str, int]) -> Sums:
        """Make step number `step` of this rank; its figures."""
        grid = self.groups.grid
        set_learning_rate(self.engine, self.learning_rate(step))
        shares = even_shares(counts, len(micro_batches), grid.data_parallel_size)
        keys = micro_batch_keys(self.config.train.seed, step, len(micro_batches), grid)
        self.is_finite, self.left_out = True, []
        with scaler_in_words():
            return self.objective.step(self.update, micro_batches, shares, keys)

    def update(
        self,
        losses: Losses,
        micro_batches: Sequence[MicroBatch],
        shares: Mapping[str, float],
        keys: Sequence[DropoutKey],
        *,
        learner: str | None = None,
        reports: Reports | None = None,
    ) -> Sums:
        """One optimizer update; its figures (`Update`)."""
        if learner not in (None, *self.objective.learners):
            known = ", ".join(self.objective.learners)
            raise ConfigError(f"the objective updates the learner {learner!r}, and its learners are: {known}")
        signs_of_life = {"heartbeat": self.heartbeat, "timer": self.recorder.timer}
        with self.turns.of(learner):
            if self.groups.grid.num_stages > 1:
                sums = run_pipeline_step(self.engine, self.objective, micro_batches, shares, keys, **signs_of_life)
            else:
                reports = self.objective.reports if reports is None else reports
                sums = run_step(self.engine, losses, micro_batches, shares, keys, reports=reports, **signs_of_life)
        if not update_is_finite(self.engine):
            self.is_finite = False
            self.left_out += [learner] if learner else []
        self.recorder.updated(learner)
        return sums

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`."""
        peak = self.config.optimizer.learning_rate
        return learning_rate(step, peak=peak, total_steps=self.total_steps, schedule=self.schedule)

    def save_and_evaluate(self) -> None:
        """What comes after a step, now and then: best weights are known before they are saved. Collective."""
        is_evaluated = self.evaluations.is_due(is_last=self.is_last)
        keeps_best = isinstance(self.objective, KeepsBest)
        is_saved = self.state.step % self.config.checkpoint.interval == 0
        if is_evaluated and keeps_best:
            is_saved |= self.evaluations.make()
        self.saver.save_when(is_saved or self.is_finished)
        if is_evaluated and not keeps_best:
            self.evaluations.make()
        if is_evaluated:
            gc.collect()  # figures are full of cycles

    def end(self) -> State:
        """Save what is not saved, conclude, close the files and say how the run ended. Collective."""
        self.saver.save_rest()
        self.profiler.finish()
        ended: State = "done" if self.is_finished and not self.evaluations.is_owed and self.conclude() else "stopped"
        self.heartbeat.mark(self.state.step, ended)
        torch.distributed.barrier(group=host_group())
        if self.writer is not None:
            self.writer.close()
            self.evaluations.draw_curves()
            self.folder.write_state(ended)
        self.heartbeat.close()
        return ended

    def conclude(self) -> bool:
        """Leave nothing but what a finished run keeps; whether all was written. Collective."""
        self.safeguard.prune()
        if not isinstance(self.objective, KeepsBest):
            return True
        try:
            self.evaluations.conclude()
        except StopRequested:
            rank_zero("the predictions of the best weights are left unfinished; the next start makes them anew")
            return False
        return True
