"""A fine-tuned model's metrics on a split of its task, and its predictions as the benchmark wants them.

CHECKPOINT is a fine-tuning run (its best weights), a checkpoint or a weights folder; of several, the logits are
averaged (an ensemble). A split without labels gives predictions only. The numbers do not depend on the number of ranks.

examples:
  python tools/evaluate_task.py runs/sst2 --data glue/SST-2 --split valid
  python tools/evaluate_task.py runs/rte-1 runs/rte-2 runs/rte-3 --data glue/RTE --split test --output submission
  python tools/evaluate_task.py runs/mnli --task ax --data glue/AX --split test --output submission
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import add_precision, build_parser, run_tool
from deberta_xl.base.errors import ConfigError, counted
from deberta_xl.base.launch import read_launch
from deberta_xl.base.output_file import check_output, check_output_folder, write_output
from deberta_xl.base.strict import at_least
from deberta_xl.public.task_predict import Predictor
from deberta_xl.run.joining import join_ranks
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.labels import labels_to_score
from deberta_xl.tasks.length_batches import MICRO_BATCH_TOKENS
from deberta_xl.tasks.metrics import check_defined, evaluate_metrics
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.reading import read_split
from deberta_xl.tasks.submission import jsonl, submission
from deberta_xl.tasks.task import Task, load_task


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="fine-tuned models")
    parser.add_argument("--data", required=True, type=Path, help="folder with the task's files")
    parser.add_argument("--split", default="valid", help="default: valid")
    parser.add_argument("--task", help="another task with the same labels than the model's own")
    parser.add_argument("--output", type=Path, help="folder for predictions and the benchmark's file")
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=MICRO_BATCH_TOKENS,
        help="most tokens in one forward, padding counted; fewer take less memory (default: %(default)s)",
    )  # fmt: skip
    add_precision(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def choose_task(name: str | None, predictor: Predictor) -> Task:
    """The model's own task, or another one that its head fits."""
    own = predictor.facts
    if name is None:
        return own.task
    task = load_task(name)
    labels = task.labels or own.labels
    if task.head != own.head.kind or (task.has_classes and labels != own.labels):
        raise ConfigError(
            f"task {name} has a {task.head} head with labels {labels}, the checkpoint a {own.head.kind} head with "
            f"{own.labels}; fine-tune for that task, or choose one with the same labels"
        )
    return task


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print, and write what was asked for."""
    at_least(1, micro_batch_tokens=arguments.micro_batch_tokens)
    launch = read_launch()
    if arguments.output is not None:
        check_output_folder(arguments.output)
    device, tokens = join_ranks(launch), arguments.micro_batch_tokens
    predictor = Predictor(arguments.checkpoints, launch, device, tokens, arguments.dtype)
    task = choose_task(arguments.task, predictor)
    inputs = [path for source in task.sources for path in source.paths(arguments.data, arguments.split)]
    for name in files_of(task, arguments.split) if arguments.output is not None else ():
        if arguments.output.is_dir():
            check_output(arguments.output / name, inputs)
    examples = read_split(task, arguments.data, arguments.split)
    labels = labels_to_score(task, predictor.facts.labels, examples, arguments.split)
    data = predictor.tokenize(examples, f"{arguments.data}, {arguments.split}", labels)
    if data.is_labelled:
        check_defined(task, data.labels, data.examples, where=f"{arguments.data}, {arguments.split}")
    found = predictor.predict(data)
    if launch.rank == 0:
        report(arguments, task, data, found)


def files_of(task: Task, split: str) -> dict[str, Callable[..., str]]:
    """Name of each file of predictions -> what writes its text."""
    return {f"{task.name}-{split}.jsonl": jsonl, task.submission.file_of(split): submission}


def report(arguments: argparse.Namespace, task: Task, data: TaskData, found: list[Prediction]) -> None:
    """Print metrics, as text and as one line of JSON; write predictions."""
    metrics = evaluate_metrics(task, data.labels, data.examples, found) if data.is_labelled else {}
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        files = files_of(task, arguments.split)
        for name, write in files.items():
            write_output(arguments.output / name, write(task, data.labels, data.examples, found))
        print(f"{arguments.output}: {', '.join(files)}")
    print(
        f"{task.name}, {arguments.split}: {counted(len(data.examples), 'example')}, {data.cuts.truncated:,} of them cut"
    )
    for name, value in metrics.items():
        print(f"  {name}  {'undefined: the predictions are all equal' if value is None else f'{value:.4f}'}")
    print(json.dumps({"task": task.name, "split": arguments.split, "examples": len(data.examples), **metrics}))


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), outputs=lambda given: filter(None, [given.output])))
