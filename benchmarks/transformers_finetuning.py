"""Repeat finished fine-tuning runs with transformers' own model and Trainer, from the same encoder, exported.

Task, files, seed and every hyperparameter are read from a run's config.toml; examples and metrics are ours, tokenizer,
model, head, batches, optimizer and loop are transformers'. Both results are printed, and the mean over the runs.

    python tools/convert.py --to huggingface encoder/run exported
    python benchmarks/transformers_finetuning.py --encoder exported runs/tasks/trec/pretrained-*
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.errors import UserError
from deberta_xl.commands.task_data import TRAIN, VALID, read_examples
from deberta_xl.objectives.task import described
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import load_config
from deberta_xl.tasks.labels import encode_labels, labels_of
from deberta_xl.tasks.metrics import evaluate_metrics, is_better
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.task import Example, Task, load_task

HEADS = ("classification", "regression")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="finished runs of deberta_xl/finetune.py")
    parser.add_argument("--encoder", type=Path, required=True, help="the runs' encoder in Hugging Face's layout")
    return parser.parse_args(arguments)


def rows_of(examples: list[Example], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """What the Trainer takes as a dataset."""
    rows = []
    for example in examples:
        encoded = tokenizer(*example.texts, truncation="longest_first", max_length=length)
        rows.append({**encoded, "labels": example.label, "length": len(encoded["input_ids"])})
    return rows


def metrics_of(task: Task, labels: list[str], seen: EvalPrediction) -> dict[str, float | None]:
    """Our metrics of what the Trainer has evaluated, in its order: by length, not the file's."""
    gold = [Example("", (), label=label.item()) for label in seen.label_ids]
    values = seen.predictions[:, 0] if task.head == "regression" else seen.predictions.argmax(-1)
    return evaluate_metrics(task, labels, gold, [Prediction(value.item(), None) for value in values])


def trainer_settings(config: FinetuneConfig, num_examples: int, folder: str) -> TrainingArguments:
    """A run's hyperparameters in the Trainer's words."""
    train, optimizer = config.train, config.optimizer
    steps = train.total_steps(num_examples)
    return TrainingArguments(
        output_dir=folder, seed=train.seed, max_steps=steps, learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay, adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon, lr_scheduler_type=config.schedule.decay, max_grad_norm=train.max_grad_norm,
        warmup_steps=config.schedule.for_steps(steps).warmup_steps,
        per_device_train_batch_size=train.global_batch_size, per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length" if train.length_bucketing else "random",
        eval_strategy="epoch", save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip


def repeat(run: Path, encoder: Path) -> tuple[float, float]:
    """The main metric on the held-out examples of the best evaluation: ours, transformers'."""
    config = load_config(run / "config.toml", (), FinetuneConfig)
    task = load_task(config.task.name)
    if task.head not in HEADS:
        raise UserError(f"{run}: task {task.name} is a {task.head}; only {', '.join(HEADS)} are repeated here")
    found, main = read_examples(task, config), task.metrics[0]
    labels = labels_of(task, found[TRAIN])
    train, valid = (encode_labels(task, labels, found[name], where=str(run)) for name in (TRAIN, VALID))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(config.train.seed)
    hidden, attention = config.model.hidden_dropout, config.model.attention_dropout
    dropout = {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention}
    chosen = {name: value for name, value in dropout.items() if value is not None}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=max(1, len(labels)), **chosen)
    length = config.model.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, trainer_settings(config, len(train), folder),
            train_dataset=rows_of(train, tokenizer, length), eval_dataset=rows_of(valid, tokenizer, length),
            data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer,
            compute_metrics=lambda seen: metrics_of(task, labels, seen),
        )  # fmt: skip
        trainer.train()
    theirs = None
    for value in (line.get(f"eval_{main}") for line in trainer.state.log_history):
        theirs = value if is_better(main, value, theirs) else theirs
    ours = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"][VALID][main]
    if ours is None or theirs is None:
        raise UserError(f"{run}: {main} is undefined (ours {ours}, transformers {theirs}): there is nothing to compare")
    print(described({f"{run}: {main} ours": ours, "transformers": theirs}), flush=True)
    return ours, theirs


def run(arguments: argparse.Namespace) -> None:
    """Every run once more, then the means."""
    pairs = [repeat(folder, arguments.encoder) for folder in arguments.runs]
    for name, values in zip(("ours", "transformers"), zip(*pairs, strict=True), strict=True):
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name}: {statistics.mean(values):.4f}{deviation} over {len(values)} runs")


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
