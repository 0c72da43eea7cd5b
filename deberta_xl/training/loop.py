"""The pretraining loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import deepspeed
import torch

from deberta_xl.architecture import DebertaConfig
from deberta_xl.checkpoint.agreement import on_rank_zero
from deberta_xl.checkpoint.store import save_checkpoint
from deberta_xl.config import RunConfig
from deberta_xl.data.loader import PretrainingData, prefetch
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.durations import duration
from deberta_xl.launch import Launch
from deberta_xl.log import rank_zero
from deberta_xl.objectives.figure_text import legend_table
from deberta_xl.objectives.figures import confusion_figure, loss_curves
from deberta_xl.objectives.masked_batches import micro_batch_keys, step_batches
from deberta_xl.objectives.masked_evaluation import Evaluation, Predict, evaluate, predict_with
from deberta_xl.objectives.masked_examples import MaskedExamples
from deberta_xl.parallel.groups import Groups
from deberta_xl.stop_request import StopRequest
from deberta_xl.training.empty_steps import EmptySteps
from deberta_xl.training.engine import StepResult, run_step, set_learning_rate, update_is_finite
from deberta_xl.training.heartbeat import Heartbeat
from deberta_xl.training.metrics import MetricsWriter, has_metric, save_curves
from deberta_xl.training.ownership import Ownership
from deberta_xl.training.pipelined import predict_in_pipeline, run_pipeline_step
from deberta_xl.training.profiling import StepProfiler
from deberta_xl.training.recorder import Recorder
from deberta_xl.training.run_folder import RunFolder, State
from deberta_xl.training.safeguard import Safeguard
from deberta_xl.training.schedule import learning_rate
from deberta_xl.training.signals import Agreement, StopRequested
from deberta_xl.training.state import TrainState

NO_LABELS = (
    "give longer rows (model.sequence_length, or longer text), more of them (train.global_batch_size), or a larger "
    "data.mask_probability; or is nearly all of the text [UNK]?"
)
STEPS_AHEAD = 2
"""Steps whose batches are prepared in the background."""


@dataclass
class Pretraining:
    """A run, assembled: what the loop works with."""

    config: RunConfig
    architecture: DebertaConfig
    launch: Launch
    groups: Groups
    engine: deepspeed.DeepSpeedEngine
    data: PretrainingData
    valid: PretrainingData | None
    tokenizer: Tokenizer
    folder: RunFolder
    state: TrainState
    heartbeat: Heartbeat
    ownership: Ownership
    safeguard: Safeguard
    stop: StopRequest
    checkpoint_files: Mapping[str, Any]
    """What rides along in every checkpoint: config.json and the tokenizer."""
    fingerprints: Mapping[str, Any]
    """What a checkpoint must agree with to be continued."""

    def train(self) -> State:
        """Train to the last step or until asked to stop; how it ended."""
        config, state = self.config, self.state
        writer = self.open_metrics()
        recorder = Recorder(self.engine, config, self.architecture, state, self.data.num_rows, self.groups, writer)
        profiler = StepProfiler(config.train.profile_steps(), self.folder.profile, self.launch.rank)
        agreement = Agreement()
        empty_steps = EmptySteps(config.train.steps, NO_LABELS)
        grid = self.groups.grid
        saved_step, owes_checkpoint = state.step, False
        self.stop.training_begins()
        is_evaluated = not self.owes_evaluation() or self.evaluate(writer, agreement)
        batches = prefetch(self.batches(), STEPS_AHEAD)
        self.engine.train()
        while state.step < config.train.steps:
            step = state.step + 1
            self.heartbeat.mark(step, "data")
            recorder.begin_step(step)
            with recorder.timer.phase("data"):
                micro_batches = next(batches)
            # The ranks that share a replica see the same labels; one of them counts.
            counted = sum(batch.num_labels for batch in micro_batches) if grid.counts_labels else 0
            num_labels, is_stopping = agreement.before_step(counted, self.stop)
            if is_stopping:
                break
            empty_steps.check(step, num_labels)
            profiler.before_step(step)
            rate = self.learning_rate(step)
            set_learning_rate(self.engine, rate)
            result = self.run_step(
                self.engine,
                micro_batches,
                num_labels=num_labels,
                data_parallel_size=grid.data_parallel_size,
                keys=micro_batch_keys(config.train.seed, step, len(micro_batches), grid),
                heartbeat=self.heartbeat,
                timer=recorder.timer,
            )
            state.advance(config.train.global_batch_size, is_finite=update_is_finite(self.engine))
            recorder.record(state, result, num_labels, rate)
            profiler.after_step(step)
            self.safeguard.after_step()
            aside = time.perf_counter()
            owes_checkpoint |= self.is_due(config.checkpoint.interval)
            if owes_checkpoint and self.safeguard.may_save():
                self.save()
                saved_step, owes_checkpoint = state.step, False
            if self.is_due(config.evaluation.interval):
                is_evaluated = self.evaluate(writer, agreement)
            recorder.pause(time.perf_counter() - aside)
        if state.step >= config.train.steps:
            self.safeguard.check_end(searches_scale=self.engine.fp16_enabled())
        if saved_step != state.step and self.safeguard.may_save():
            self.save()
        return self.finish(writer, is_evaluated=is_evaluated)

    def batches(self) -> Any:
        """This rank's micro-batches for every step from here on."""
        return step_batches(
            self.data,
            self.config.train,
            self.state.consumed_samples,
            rank=self.groups.grid.data_parallel_rank,
            size=self.groups.grid.data_parallel_size,
            pin=self.engine.device.type == "cuda",
        )

    @property
    def run_step(self) -> Callable[..., StepResult]:
        """One optimizer step on the micro-batches of this rank."""
        return run_pipeline_step if self.groups.grid.num_stages > 1 else run_step

    @property
    def predict(self) -> Predict:
        """The model's word on held-out batches."""
        if self.groups.grid.num_stages > 1:
            return partial(predict_in_pipeline, self.engine, groups=self.groups)
        return predict_with(self.engine, self.engine.device)

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`."""
        return learning_rate(
            step,
            peak=self.config.optimizer.learning_rate,
            total_steps=self.config.train.steps,
            schedule=self.config.schedule,
        )

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        return self.state.step % interval == 0 or self.state.step == self.config.train.steps

    def open_metrics(self) -> MetricsWriter | None:
        """The metrics of the run, on rank 0."""
        if self.launch.rank != 0:
            return None
        return MetricsWriter(
            self.folder.metrics,
            self.folder.tensorboard,
            first_step=self.state.step,
            total_steps=self.config.train.steps,
            ownership=self.ownership,
        )

    def save(self) -> None:
        """Write a checkpoint; the safeguard will drop the oldest ones. Collective."""
        step = self.state.step
        self.heartbeat.mark(step, "checkpoint")
        start = time.perf_counter()
        on_rank_zero(self.ownership.check)
        state = {**asdict(self.state), "fingerprints": dict(self.fingerprints)}
        folder = save_checkpoint(
            self.engine,
            self.folder.checkpoints,
            state,
            extra_files=self.checkpoint_files,
            tensor_parallel=(self.groups.grid.tensor_parallel_size, self.groups.grid.tensor_parallel_rank),
        )
        on_rank_zero(lambda: self.folder.write_latest(folder))
        self.safeguard.saved(folder)
        rank_zero("checkpoint %s written in %s", folder, duration(time.perf_counter() - start))

    def owes_evaluation(self) -> bool:
        """Whether the start before was ended in, or before, the evaluation of the step it saved. Collective."""
        if self.valid is None or self.state.step == 0 or not self.is_due(self.config.evaluation.interval):
            return False
        return not on_rank_zero(lambda: has_metric(self.folder.metrics, self.state.step, "valid_loss"))

    def evaluate(self, writer: MetricsWriter | None, agreement: Agreement) -> bool:
        """Measure the held-out loss and write it, with pictures; false when asked to stop meanwhile. Collective."""
        if self.valid is None:
            return True
        self.heartbeat.mark(self.state.step, "evaluation")
        self.engine.eval()
        examples = MaskedExamples()
        try:
            result = evaluate(
                self.predict,
                self.valid,
                vocab_size=self.architecture.vocab_size,
                device=self.engine.device,
                max_samples=self.config.evaluation.max_samples,
                micro_batch_size=self.config.train.micro_batch_size,
                rank=self.groups.grid.data_parallel_rank,
                size=self.groups.grid.data_parallel_size,
                group=self.groups.data_group,
                log_unigram=None if writer is None else self.data.log_unigram,
                guard=lambda batches: examples.watch(agreement.until_stopped(batches, stop=self.stop)),
            )
        except StopRequested:
            rank_zero("the evaluation of step %d is left unfinished; the next start makes it anew", self.state.step)
            return False
        finally:
            self.engine.train()
        if writer is not None:
            self.write_evaluation(writer, result, examples)
        return True

    def write_evaluation(self, writer: MetricsWriter, result: Evaluation, examples: MaskedExamples) -> None:
        """One evaluation to console, metrics, TensorBoard and the loss curve."""
        step, piece_of = self.state.step, self.piece_of
        values = {
            "valid_loss": result.loss,
            "valid_perplexity": result.perplexity,
            "valid_accuracy": result.accuracy,
            "valid_unigram_entropy": result.unigram_entropy,
        }
        writer.write(step, values)
        if len(result.label_L):
            writer.write_text(step, "valid/predictions", examples.table(result.guess_L, piece_of))
            confusion = confusion_figure(result.label_L, result.guess_L, piece_of)
            writer.write_figure(step, "valid/confusion", confusion.figure)
            if confusion.legend:
                writer.write_text(step, "valid/confusion_names", legend_table(confusion.legend))
        save_curves(self.folder.metrics, self.folder.path / "loss.png", loss_curves)
        rank_zero(
            "step %d  validation loss %.4f (unigram of the training set: %.4f)  perplexity %.2f  accuracy %.1f %%",
            step, result.loss, result.unigram_entropy, result.perplexity, 100 * result.accuracy,
        )  # fmt: skip

    def piece_of(self, token_id: int) -> str:
        """The piece of a guess; with a `model.vocab_size` above the tokenizer's there are ids that it does not know."""
        return self.tokenizer.id_to_piece(token_id) if token_id < self.tokenizer.vocab_size else f"[ROW {token_id}]"

    def finish(self, writer: MetricsWriter | None, *, is_evaluated: bool) -> State:
        """Close the files and say how the run ended. Collective."""
        ended: State = "done" if self.state.step >= self.config.train.steps and is_evaluated else "stopped"
        if ended == "done":
            self.safeguard.prune()
        self.heartbeat.mark(self.state.step, ended)
        torch.distributed.barrier()
        if writer is not None:
            writer.close()
            if self.folder.metrics.exists():
                save_curves(self.folder.metrics, self.folder.path / "loss.png", loss_curves)
            self.folder.write_state(ended)
        self.heartbeat.close()
        return ended
