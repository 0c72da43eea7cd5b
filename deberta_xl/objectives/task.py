"""Fine-tuning on a task, with SiFT or without."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from deberta_xl.base.errors import Diverged
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.together import on_rank_zero
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import forward_flops
from deberta_xl.model.task_model import TaskModel
from deberta_xl.objectives.evaluation import Evaluation, Evaluator, Model, Sums
from deberta_xl.objectives.objective import Guessing, KeepsBest, Mean, Ratio
from deberta_xl.objectives.sift import build_sift
from deberta_xl.objectives.task_batches import TaskLoss, TaskMicroBatch, task_step_batches
from deberta_xl.objectives.task_evaluation import task_logits
from deberta_xl.objectives.task_figures import metric_curves, task_figures
from deberta_xl.planning.workload import task_workload
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.metrics import evaluate_metrics, is_better
from deberta_xl.tasks.predictions import Prediction, PredictionError, predictions_of
from deberta_xl.tasks.submission import jsonl, submission
from deberta_xl.tasks.task import examples_fingerprint
from deberta_xl.weights.head_facts import HEAD_NAME, HeadFacts
from deberta_xl.weights.initial_encoder import find_init, load_encoder
from deberta_xl.weights.initial_weights import encoder_fingerprints
from deberta_xl.weights.native import files_beside_weights

VALID = "valid"
"""The split that chooses the best weights."""


class TaskObjective(KeepsBest):
    """A task's loss on its training examples, its metrics on the others; the best weights are kept."""

    counts = ("items", "tokens")
    nothing_to_learn = "the words that carry labels are cut from these examples; give a larger model.sequence_length"
    curves_file = "metrics.png"
    keeps_pictures = True

    def __init__(
        self,
        config: FinetuneConfig,
        architecture: DebertaConfig,
        head: HeadFacts,
        tokenizer: Tokenizer,
        train_data: TaskData,
        held_out_data: Mapping[str, TaskData],
        class_weights: np.ndarray | None,
    ):
        """`held_out_data` are the examples of the other splits, `valid` among them."""
        self.config, self.architecture, self.head, self.tokenizer = config, architecture, head, tokenizer
        self.train_data, self.held_out_data = train_data, held_out_data
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights)
        self.sift = build_sift(config.sift, head.head.kind)
        self.patience = config.evaluation.patience

    def build(self) -> TaskModel:
        """The encoder with the task's head."""
        return TaskModel(self.architecture, self.head.head, self.config.train.seed)

    def load_initial(self, model: TaskModel) -> None:
        """The encoder of `train.init`, and its head where that is for the same classes. Collective."""
        train = self.config.train
        if not train.fresh_weights:
            source = on_rank_zero(lambda: find_init(Path(train.init)))
            load_encoder(model, source, self.head.labels)
            rank_zero("weights from %s", source)

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """Architecture, task, data, tokenizer and seed."""
        length = self.config.model.sequence_length
        return {
            **encoder_fingerprints(self.architecture, length, self.tokenizer),
            "task": {
                "kind": self.head.head.kind,
                "labels": self.head.labels,
                "document_stride": self.head.document_stride if self.head.head.kind == "span" else None,
                "normalized_twice": self.head.normalized_twice,
            },
            "data": examples_fingerprint(self.train_data.examples),
            "seed": self.config.train.seed,
        }

    def checkpoint_files(self, step: int) -> Mapping[str, bytes]:
        """The architecture, the head and the tokenizer."""
        return files_beside_weights(self.architecture, self.tokenizer) | {HEAD_NAME: self.head.to_json()}

    @property
    def num_samples(self) -> int:
        """Features of an epoch."""
        return len(self.train_data)

    def batches(self, first_step: int, first_sample: int, *, rank: int, size: int) -> Iterator[list[TaskMicroBatch]]:
        """The features of the steps from `first_step` on."""
        return task_step_batches(self.train_data, self.config.train, first_step, rank=rank, size=size)

    @property
    def reports(self) -> Mapping[str, Mean | Ratio]:
        """The whole loss and its parts."""
        adversarial = {"adversarial_loss": Mean("items")} if self.sift else {}
        return {"loss": Mean("items"), "task_loss": Mean("items"), **adversarial}

    def losses(self, model: Model, batch: TaskMicroBatch, shares: Mapping[str, float], key: DropoutKey | None) -> Sums:
        """The task's loss, and SiFT's, from passes that the engine takes for one forward."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(batch.labels.device)  # moves once
        objective = TaskLoss(
            self.head.head.kind,
            self.architecture.hidden_size,
            batch,
            share=shares["items"],
            sift=self.sift,
            sift_weight=self.config.sift.weight,
            class_weights=self.class_weights,
            key=key,
        )
        found = model(
            batch.input_ids_BS,
            batch.segments_BS,
            batch.token_types_BS,
            num_options=batch.num_options,
            objective=objective,
        )
        return dict(zip(self.reports, found, strict=False))

    def step_flops(self, step: int, counts: Mapping[str, float]) -> float:
        """Of the tokens that are no padding, as if all texts were of their mean length."""
        num_options = self.train_data.num_options
        work = task_workload(self.architecture, self.head.head, self.config, num_options)
        rows = self.config.train.global_batch_size * num_options
        return work.forwards * forward_flops(work.parts, Load(rows, counts["tokens"] / rows))

    @property
    def guessing(self) -> Guessing | None:
        """All classes alike; a regression or a span has none that is known."""
        kind, data = self.head.head.kind, self.train_data
        choices = {
            "classification": self.head.head.num_labels,
            "token": self.head.head.num_labels,
            "choice": data.num_options,
            "multi_label": 2,
        }
        return Guessing("task_loss", math.log(choices[kind])) if kind in choices else None

    @property
    def has_held_out(self) -> bool:
        """A task has a validation split."""
        return True

    def is_evaluation_due(self, step: int) -> bool:
        """Every `evaluation.interval` steps, else once an epoch."""
        interval = self.config.evaluation.interval
        return step % interval == 0 if interval else self.config.train.ends_epoch(step, len(self.train_data))

    def evaluate(self, run: Evaluator) -> Evaluation:
        """The task's metrics on the validation split, and its pictures."""
        data = self.held_out_data[VALID]
        found = self.predict(run, data)
        values = self.metrics_of(data, found)
        pictures = task_figures(data.task, data.labels, data.examples, found) if run.is_first else {}
        return Evaluation(values, described(values), pictures=pictures)

    def predict(self, run: Evaluator, data: TaskData) -> list[Prediction]:
        """Predictions for a split, on every rank. Collective."""
        entry = self.sift.entry() if self.sift else None
        config = self.config
        # As many as a micro-batch of the training may have.
        tokens = config.train.micro_batch_size * config.model.sequence_length * data.num_options
        logits = task_logits(run, data, micro_batch_tokens=tokens, entry=entry)
        try:
            return predictions_of(data, logits)
        except PredictionError as error:
            raise Diverged(str(error)) from error

    def metrics_of(self, data: TaskData, found: Sequence[Prediction]) -> dict[str, float | None]:
        """The task's metrics, computed on rank 0 for all. Collective."""
        return on_rank_zero(lambda: evaluate_metrics(data.task, data.labels, data.examples, found))

    def value_of(self, values: Mapping[str, float | None]) -> float | None:
        """The task's first metric."""
        return values[self.train_data.task.metrics[0]]

    def is_better(self, value: float | None, best: float | None) -> bool:
        """By the task's first metric."""
        return is_better(self.train_data.task.metrics[0], value, best)

    def conclude(self, run: Evaluator, *, best_step: int, steps: int) -> Mapping[str, str]:
        """Metrics and predictions of every held-out split, and results.json."""
        results: dict[str, Any] = {}
        files: dict[str, str] = {}
        for split, data in self.held_out_data.items():
            found = self.predict(run, data)
            if data.is_labelled:
                results[split] = self.metrics_of(data, found)
                rank_zero("best weights (step %d), %s: %s", best_step, split, described(results[split]))
            files |= prediction_files(split, data, found)
        facts = {
            "task": self.train_data.task.name,
            "seed": self.config.train.seed,
            "best_step": best_step,
            "steps": steps,
            "cuts": {name: d.cuts._asdict() for name, d in {"train": self.train_data, **self.held_out_data}.items()},
            "metrics": results,
        }
        return files | {"results.json": json.dumps(facts, indent=2) + "\n"}

    def curves(self, lines: Sequence[Mapping[str, float]]) -> Figure:
        """Training losses and held-out metrics."""
        return metric_curves(lines, self.train_data.task.metrics)


def prediction_files(split: str, data: TaskData, found: Sequence[Prediction]) -> dict[str, str]:
    """Predictions of a split, one per line for people and one file as the benchmark wants it."""
    task, folder = data.task, f"predictions/{split}"
    files = {f"{folder}/predictions.jsonl": jsonl(task, data.labels, data.examples, found)}
    if task.submission.format != "jsonl":
        files[f"{folder}/{task.submission.file_of(split)}"] = submission(task, data.labels, data.examples, found)
    return files


def described(values: Mapping[str, float | None]) -> str:
    """Metrics in one line."""
    return "  ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in values.items())
