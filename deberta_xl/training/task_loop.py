"""The fine-tuning loop."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor

from deberta_xl.checkpoint.agreement import on_rank_zero
from deberta_xl.checkpoint.manifest import step_folder_name
from deberta_xl.checkpoint.store import load_checkpoint, save_checkpoint
from deberta_xl.config import ScheduleSection
from deberta_xl.data.loader import prefetch
from deberta_xl.data.task_features import TaskData
from deberta_xl.data.task_metrics import evaluate_metrics
from deberta_xl.data.task_predictions import Prediction, PredictionError, predictions_of
from deberta_xl.data.task_submission import jsonl, submission
from deberta_xl.errors import Diverged
from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.launch import Launch
from deberta_xl.log import rank_zero
from deberta_xl.objectives.figure_text import Picture, legend_lines, legend_table
from deberta_xl.objectives.masked_batches import micro_batch_keys
from deberta_xl.objectives.sift import Sift
from deberta_xl.objectives.task_batches import TaskMicroBatch, task_step_batches
from deberta_xl.objectives.task_evaluation import task_logits
from deberta_xl.objectives.task_figures import metric_curves, task_figures
from deberta_xl.parallel.groups import Groups
from deberta_xl.stop_request import StopRequest
from deberta_xl.training.empty_steps import EmptySteps
from deberta_xl.training.engine import set_learning_rate, update_is_finite
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.metrics import MetricsWriter, save_curves
from deberta_xl.training.ownership import Ownership
from deberta_xl.training.run_folder import RunFolder, State, write_text, writing
from deberta_xl.training.safeguard import Safeguard
from deberta_xl.training.schedule import learning_rate
from deberta_xl.training.signals import Agreement, StopRequested
from deberta_xl.training.task_recorder import TaskRecorder
from deberta_xl.training.task_state import TaskState
from deberta_xl.training.task_step import run_task_step

NO_LABELS = "the words that carry labels are cut from these examples; give a larger model.sequence_length"
STEPS_AHEAD = 2
"""Steps whose batches are prepared in the background."""
VALID = "valid"
"""The split that chooses the best weights."""


@dataclass
class Finetuning:
    """A run, assembled: what the loop works with."""

    config: FinetuneConfig
    launch: Launch
    groups: Groups
    engine: deepspeed.DeepSpeedEngine
    train_data: TaskData
    held_out: Mapping[str, TaskData]
    """Split -> examples; `valid` among them."""
    total_steps: int
    schedule: ScheduleSection
    sift: Sift | None
    class_weights: Tensor | None
    folder: RunFolder
    state: TaskState
    heartbeat: Heartbeat
    ownership: Ownership
    safeguard: Safeguard
    stop: StopRequest
    checkpoint_files: Mapping[str, Any]
    """What rides along in every checkpoint: config.json, head.json and the tokenizer."""
    fingerprints: Mapping[str, Any]
    """What a checkpoint must agree with to be continued."""

    @property
    def is_finished(self) -> bool:
        """Whether the last step is made, or waiting longer is of no use."""
        return self.state.step >= self.total_steps or self.state.has_waited(self.config.evaluation.patience)

    @property
    def owes_evaluation(self) -> bool:
        """Whether this step's evaluation was left unfinished."""
        return 0 < self.state.step != self.state.evaluated_step and self.is_evaluated

    def train(self) -> State:
        """Train to the end or until asked to stop; how it ended."""
        config, state, grid = self.config, self.state, self.groups.grid
        writer = self.open_metrics()
        recorder = TaskRecorder(self.engine, config, state, len(self.train_data), self.total_steps, self.groups, writer)
        agreement = Agreement()
        empty_steps = EmptySteps(self.total_steps, NO_LABELS)
        saved_step, owes_checkpoint = state.step, False
        self.stop.training_begins()
        if self.owes_evaluation and self.evaluate(writer, agreement):
            self.save()
        batches = prefetch(self.batches(), STEPS_AHEAD)
        self.engine.train()
        while not self.is_finished:
            step = state.step + 1
            self.heartbeat.mark(step, "data")
            recorder.begin_step(step)
            with recorder.timer.phase("data"):
                micro_batches = next(batches)
            # The ranks that share a replica see the same examples; one of them counts.
            counted = 0 if grid.tensor_parallel_rank else sum(batch.num_items for batch in micro_batches)
            num_items, is_stopping = agreement.before_step(counted, self.stop)
            if is_stopping:
                break
            empty_steps.check(step, num_items)
            rate = self.learning_rate(step)
            set_learning_rate(self.engine, rate)
            losses = run_task_step(
                self.engine,
                micro_batches,
                num_items=num_items,
                data_parallel_size=grid.data_parallel_size,
                sift=self.sift,
                sift_weight=config.sift.weight,
                class_weights=self.class_weights,
                keys=micro_batch_keys(config.train.seed, step, len(micro_batches), grid),
                heartbeat=self.heartbeat,
                timer=recorder.timer,
            )
            state.advance(config.train.global_batch_size, is_finite=update_is_finite(self.engine))
            num_tokens = sum(batch.input_ids_BS.numel() for batch in micro_batches)
            recorder.record(state, losses, num_tokens, rate, has_labels=num_items > 0)
            self.safeguard.after_step()
            aside = time.perf_counter()
            is_best = self.is_evaluated and self.evaluate(writer, agreement)
            owes_checkpoint |= is_best or self.is_due(config.checkpoint.interval) or self.is_finished
            if owes_checkpoint and self.safeguard.may_save():
                self.save()
                saved_step, owes_checkpoint = state.step, False
            recorder.pause(time.perf_counter() - aside)
        if self.is_finished:
            self.safeguard.check_end(searches_scale=self.engine.fp16_enabled())
        if saved_step != state.step and self.safeguard.may_save():
            self.save()
        return self.finish(writer, agreement)

    def batches(self) -> Iterator[list[TaskMicroBatch]]:
        """This rank's micro-batches for every step from here on."""
        grid = self.groups.grid
        return task_step_batches(
            self.train_data,
            self.config.train,
            self.state.step + 1,
            rank=grid.data_parallel_rank,
            size=grid.data_parallel_size,
            pin=self.engine.device.type == "cuda",
        )

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`."""
        peak = self.config.optimizer.learning_rate
        return learning_rate(step, peak=peak, total_steps=self.total_steps, schedule=self.schedule)

    @property
    def is_evaluated(self) -> bool:
        """Whether this step's weights are measured: every `evaluation.interval` steps, else once an epoch; the last."""
        if self.config.evaluation.interval:
            return self.is_due(self.config.evaluation.interval)
        step = self.state.step
        return step == self.total_steps or self.config.train.ends_epoch(step, len(self.train_data))

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        return self.state.step % interval == 0 or self.state.step == self.total_steps

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
    def tensor_parallel(self) -> tuple[int, int]:
        """Size and rank."""
        return self.groups.grid.tensor_parallel_size, self.groups.grid.tensor_parallel_rank

    def save(self) -> None:
        """Write a checkpoint; the safeguard will drop older ones, but not the best. Collective."""
        self.heartbeat.mark(self.state.step, "checkpoint")
        on_rank_zero(self.ownership.check)
        folder = save_checkpoint(
            self.engine,
            self.folder.checkpoints,
            {**asdict(self.state), "fingerprints": dict(self.fingerprints)},
            extra_files=self.checkpoint_files,
            tensor_parallel=self.tensor_parallel,
        )
        on_rank_zero(lambda: self.folder.write_latest(folder))
        self.safeguard.saved(folder)

    def predict(self, data: TaskData, agreement: Agreement) -> list[Prediction]:
        """Predictions for a split, on every rank. Raises StopRequested when asked to stop meanwhile. Collective."""
        self.heartbeat.mark(self.state.step, "evaluation")
        self.engine.eval()
        try:
            logits = task_logits(
                self.engine,
                data,
                device=self.engine.device,
                micro_batch_size=self.config.train.micro_batch_size,
                entry=self.sift.entry() if self.sift else None,
                rank=self.groups.grid.data_parallel_rank,
                size=self.groups.grid.data_parallel_size,
                group=self.groups.data_group,
                guard=partial(agreement.until_stopped, stop=self.stop),
            )
            return predictions_of(data, logits)
        except PredictionError as error:
            raise Diverged(str(error)) from error
        finally:
            self.engine.train()

    def metrics_of(self, data: TaskData, found: list[Prediction]) -> dict[str, float | None]:
        """The task's metrics, computed on rank 0 for all. Collective."""
        return on_rank_zero(lambda: evaluate_metrics(data.task, data.labels, data.examples, found))

    def evaluate(self, writer: MetricsWriter | None, agreement: Agreement) -> bool:
        """Measure the held-out metrics, with pictures; whether these weights are the best so far. Collective.

        When asked to stop meanwhile, nothing is recorded, and the next start makes the evaluation anew.
        """
        data, step = self.held_out[VALID], self.state.step
        try:
            found = self.predict(data, agreement)
        except StopRequested:
            rank_zero("the evaluation of step %d is left unfinished; the next start makes it anew", step)
            return False
        values = self.metrics_of(data, found)
        main = data.task.metrics[0]
        is_best = self.state.take(main, values[main])
        if writer is not None:
            writer.write(step, {f"valid_{name}": value for name, value in values.items()})
            for name, picture in task_figures(data.task, data.labels, data.examples, found).items():
                self.write_picture(writer, name, picture)
            save_curves(
                self.folder.metrics, self.folder.path / "metrics.png", partial(metric_curves, names=data.task.metrics)
            )
            rank_zero("step %d  %s%s", step, described(values), "  (best so far)" if is_best else "")
        return is_best

    def write_picture(self, writer: MetricsWriter, name: str, picture: Picture) -> None:
        """A picture for TensorBoard and the run folder; what its names stand for in a text beside it, said once."""
        step, legend_file = self.state.step, self.folder.path / f"{name}.txt"
        writer.write_figure(step, f"valid/{name}", picture.figure)
        with writing(path := self.folder.path / f"{name}.png"):
            picture.figure.savefig(path, dpi=120)
        if picture.legend:
            if not legend_file.exists():
                rank_zero("%s.png has no room or no font for some names; %s has them", name, legend_file)
            writer.write_text(step, f"valid/{name}_names", legend_table(picture.legend))
            write_text(legend_file, legend_lines(picture.legend))

    def finish(self, writer: MetricsWriter | None, agreement: Agreement) -> State:
        """Close the files and say how the run ended; at its end, write what the best weights predict. Collective."""
        ended: State = "done" if self.is_finished and not self.owes_evaluation else "stopped"
        if ended == "done":
            self.safeguard.prune()
            try:
                self.conclude(agreement)
            except StopRequested:
                rank_zero("the predictions of the best weights are left unfinished; the next start makes them anew")
                ended = "stopped"
        self.heartbeat.mark(self.state.step, ended)
        torch.distributed.barrier()
        if writer is not None:
            writer.close()
            self.folder.write_state(ended)
        self.heartbeat.close()
        return ended

    def conclude(self, agreement: Agreement) -> None:
        """Metrics and predictions of the best weights for every held-out split, and results.json. Collective."""
        best = self.folder.checkpoints / step_folder_name(self.state.best_step)
        if self.state.best_step != self.state.step:
            load_checkpoint(self.engine, best, tensor_parallel=self.tensor_parallel)
        results: dict[str, Any] = {}
        for split, data in self.held_out.items():
            found = self.predict(data, agreement)
            if data.is_labelled:
                results[split] = self.metrics_of(data, found)
                rank_zero("best weights (step %d), %s: %s", self.state.best_step, split, described(results[split]))
            on_rank_zero(lambda split=split, data=data, found=found: self.write_predictions(split, data, found))
        on_rank_zero(lambda: self.write_results(results))

    def write_predictions(self, split: str, data: TaskData, found: list[Prediction]) -> None:
        """Predictions of a split, one per line for people and one file as the benchmark wants it."""
        folder = self.folder.path / "predictions" / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        task = data.task
        described_lines = jsonl(task, data.labels, data.examples, found)
        write_text(folder / "predictions.jsonl", described_lines)
        if task.submission.format != "jsonl":
            write_text(folder / task.submission.file_of(split), submission(task, data.labels, data.examples, found))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """The run in one small file, which tools/table.py reads."""
        train = self.config.train
        facts = {
            "task": self.train_data.task.name,
            "seed": train.seed,
            "best_step": self.state.best_step,
            "steps": self.state.step,
            "cuts": {name: data.cuts._asdict() for name, data in {"train": self.train_data, **self.held_out}.items()},
            "metrics": results,
        }
        write_text(self.folder.path / "results.json", json.dumps(facts, indent=2) + "\n")


def described(values: Mapping[str, float | None]) -> str:
    """Metrics in one line."""
    return "  ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in values.items())
