r"""Which objective makes the better encoder of the same compute? Pretrain one small encoder by each, then fine-tune it.

Same text, tokenizer, encoder, batches and learning rate for all. `masked_lm` makes --steps steps; every other objective
makes as many as cost the same operations by the project's own count (planning/, matrix products, forward and backward),
generator included. The encoder of each is then fine-tuned on real tasks; of those that predict the next token the
perplexity on the held-out text is measured instead. Each run is one ordinary command, which is shown; what is finished
is not made again, so the same command goes on. The table goes to OUTPUT/table.md.

TEXT and HELD_OUT are .txt or .jsonl files; DATA has a folder for each task with its files as they are published (see
benchmarks/real_tasks.py).

examples:
  python benchmarks/objectives.py --text wikitext/valid.txt books/*.txt --held_out wikitext/test.txt \
      --data DATA --output runs/objectives
  python benchmarks/objectives.py --text TEXT --held_out HELD_OUT --data DATA --output runs/trial --steps 40 \
      --seeds 1 --objectives masked_lm rtd_gdes --tasks trec
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from benchmarks.real_tasks import COMMON, ROOT, TASKS, agree_on_sources, run_all
from deberta_xl.base.errors import UserError
from deberta_xl.base.strict import own_path
from deberta_xl.commands.pretraining import parse_arguments as parse_pretraining
from deberta_xl.commands.pretraining import read_inputs
from deberta_xl.settings.files import read_toml

ENGINE = ["--deepspeed_config", "deepspeed_configs/cpu_debug.json"]
COMMON_PRETRAINING = [
    "model.conv_kernel_size=0",  # of the other settings of `debug`: 4 layers of 128, rows of 128 tokens
    "model.dropout=0",  # a few passes over some megabytes: far from learning them by heart
    "train.global_batch_size=32",
    "train.micro_batch_size=16",  # so that a step of `mixed` has some of either kind
    "optimizer.learning_rate=1e-3",
    "checkpoint.interval=100000",
    "checkpoint.keep=1",
    "evaluation.interval=100000",
]
WARMUP_SHARE = 0.1
SHORTER = {"sst2": ("train.epochs=1",)}
"""Of what takes longest, less: all should be done within an hour."""
RTD = ("train.objective=replaced_tokens", "data.max_ngram=1", "data.replace_with_mask=1", "data.replace_with_random=0")


class Objective(NamedTuple):
    """A way to pretrain."""

    words: str
    """As the table calls it."""
    overrides: tuple[str, ...] = ()
    is_autoregressive: bool = False


OBJECTIVES = {
    "masked_lm": Objective("masked LM with EMD"),
    "masked_lm_plain": Objective("masked LM without EMD", ("model.decoder_passes=0",)),
    "rtd_gdes": Objective("replaced tokens, GDES", RTD),
    "rtd_es": Objective(
        "replaced tokens, ES (joint)", (*RTD, "replaced_tokens.sharing=es", "replaced_tokens.training=joint")
    ),
    "rtd_none": Objective("replaced tokens, nothing shared", (*RTD, "replaced_tokens.sharing=none")),
    "causal": Objective("causal", ("train.objective=causal",), True),
    "mixed": Objective("masked LM and causal, half each", ("train.objective=mixed",), True),
}
FRESH = "none"
"""The encoder without pretraining, which every objective has to beat."""


class Pretraining(NamedTuple):
    """How much an objective gets."""

    steps: int
    step_flops: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--text", type=own_path, nargs="+", required=True, help="what to pretrain on")
    parser.add_argument("--held_out", type=own_path, nargs="+", required=True, help="what to measure perplexity on")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--output", type=Path, required=True, help="where everything goes")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="default: all")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=["trec", "sick", "sst2"], help="default: trec sick sst2"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--steps", type=int, default=400, help="steps of masked_lm (default: 400)")
    parser.add_argument("--vocab_size", type=int, default=8000, help="default: 8000")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
    return parser.parse_args(arguments)


def prepare_data(arguments: argparse.Namespace) -> None:
    """Tokenizer and datasets, where they are not there yet."""
    output, size = arguments.output, str(arguments.vocab_size)
    commands = []
    if not (output / "tokenizer").exists():
        tool = ["python", "tools/train_tokenizer.py", "--allow_smaller", "--vocab_size", size]
        commands.append([*tool, "--input", *arguments.text, "--output", str(output / "tokenizer")])
    for name, texts in (("train", arguments.text), ("valid", arguments.held_out)):
        if not (output / f"data/{name}.manifest.json").exists():
            tool = ["python", "tools/preprocess.py", "--documents", "parts", "--tokenizer", str(output / "tokenizer")]
            commands.append([*tool, "--input", *texts, "--output", str(output / "data" / name), "--overwrite"])
    run_all(commands, 1)


def pretraining_settings(arguments: argparse.Namespace, name: str, seed: int, steps: int) -> list[str]:
    """What deberta_xl/pretrain.py is given."""
    output = arguments.output
    return [
        "--config", "debug", *ENGINE, f"data.train={output}/data/train", f"data.valid={output}/data/valid",
        f"run.folder={run_folder(arguments, name, seed)}", f"train.seed={seed}", f"train.steps={steps}",
        f"schedule.warmup_steps={round(WARMUP_SHARE * steps)}", *COMMON_PRETRAINING, *OBJECTIVES[name].overrides,
    ]  # fmt: skip


def run_folder(arguments: argparse.Namespace, name: str, seed: int, task: str = "pretraining") -> Path:
    """Where a run keeps everything."""
    return arguments.output / task / f"{name}-{seed}"


def share_out(arguments: argparse.Namespace) -> dict[str, Pretraining]:
    """The steps of each objective: as many as cost what --steps of masked_lm do."""

    def step_flops(name: str) -> float:
        inputs = read_inputs(parse_pretraining(pretraining_settings(arguments, name, 1, arguments.steps)))
        return inputs.outlook.work.step_flops(inputs.config.train.global_batch_size)

    budget = arguments.steps * step_flops("masked_lm")
    costs = {name: step_flops(name) for name in arguments.objectives}
    return {name: Pretraining(max(1, round(budget / cost)), cost) for name, cost in costs.items()}


def pretrain(arguments: argparse.Namespace, shares: dict[str, Pretraining]) -> None:
    """Every objective with every seed."""
    commands = []
    for seed in arguments.seeds:
        for name, share in shares.items():
            folder = run_folder(arguments, name, seed)
            if is_done(folder):
                check_steps(folder, share.steps)
                continue
            settings = pretraining_settings(arguments, name, seed, share.steps)
            commands.append(["python", "deberta_xl/pretrain.py", *settings])
    run_all(commands, arguments.jobs)


def is_done(folder: Path) -> bool:
    """Whether a pretraining run has ended."""
    state = folder / "STATE"
    return state.is_file() and state.read_text(encoding="utf-8").strip() == "done"


def check_steps(folder: Path, steps: int) -> None:
    """Refuse to mix runs of different budgets. Raises UserError."""
    made = read_toml(folder / "config.toml")["train"]["steps"]
    if made != steps:
        raise UserError(f"{folder} has made {made} steps, now it should be {steps}: give the same --steps, or --output")


def finetune(arguments: argparse.Namespace) -> None:
    """Every encoder on every task, and once without pretraining."""
    commands = []
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for name in encoders_of(arguments):
                folder = run_folder(arguments, name, seed, task)
                if not (folder / "results.json").exists():
                    commands.append(finetuning_command(arguments, name, seed, task))
    run_all(commands, arguments.jobs)


def encoders_of(arguments: argparse.Namespace) -> list[str]:
    """What is fine-tuned: the encoders that see both sides, and one without pretraining."""
    return [name for name in arguments.objectives if not OBJECTIVES[name].is_autoregressive] + [FRESH]


def finetuning_command(arguments: argparse.Namespace, name: str, seed: int, task: str) -> list[str]:
    """Of one run; without pretraining the first objective's run lends its sizes and tokenizer."""
    trial, folder = TASKS[task], run_folder(arguments, name, seed, task)
    encoder = run_folder(arguments, arguments.objectives[0] if name == FRESH else name, seed)
    fresh = ["train.fresh_weights=true"] if name == FRESH else []
    files = ["--task", trial.task, "--data", str(arguments.data / trial.folder), "--init", str(encoder)]
    run = ["--config", "finetune", *ENGINE, *files, f"run.folder={folder}", f"train.seed={seed}"]
    return ["python", "deberta_xl/finetune.py", *run, *COMMON, *trial.overrides, *SHORTER.get(task, ()), *fresh]


def task_result(folder: Path) -> tuple[str, float]:
    """Metric with its split, and value: on the test set where that has labels, which chose no weights."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    split = "test" if results["metrics"].get("test") else "valid"
    metric, value = next(iter(results["metrics"][split].items()))
    return f"{metric}, {split}", value


def perplexity(arguments: argparse.Namespace, name: str, seed: int) -> float:
    """Of the held-out text, by tools/evaluate.py; kept beside the run."""
    kept = run_folder(arguments, name, seed) / "perplexity.json"
    if not kept.exists():
        command = ["tools/evaluate.py", run_folder(arguments, name, seed), arguments.output / "data" / "valid"]
        said = subprocess.run(
            [sys.executable, *map(str, command), "--metric", "perplexity"],
            cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE,
        ).stdout  # fmt: skip
        kept.write_text(said.strip().splitlines()[-1] + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))["perplexity"]


def table(arguments: argparse.Namespace, shares: dict[str, Pretraining]) -> str:
    """Everything in Markdown: means over the seeds, and how far those are apart."""
    seeds, tasks = arguments.seeds, arguments.tasks
    found = {
        (name, task): [task_result(run_folder(arguments, name, seed, task)) for seed in seeds]
        for name in encoders_of(arguments)
        for task in tasks
    }
    metrics = [f"{task} ({found[FRESH, task][0][0]})" for task in tasks]
    rows = [["objective", "steps", "10^12 operations", *metrics, "perplexity"]]
    rows.append(["---"] * len(rows[0]))
    for name in [FRESH, *shares]:
        share = shares.get(name, Pretraining(0, 0))
        writes = name in shares and OBJECTIVES[name].is_autoregressive
        cells = ["–" if writes else spread([value for _, value in found[name, task]], ".3f") for task in tasks]
        words = OBJECTIVES[name].words if name in shares else "no pretraining"
        last = spread([perplexity(arguments, name, seed) for seed in seeds], ".1f") if writes else "–"
        rows.append([words, f"{share.steps:,}", f"{share.steps * share.step_flops / 1e12:,.1f}", *cells, last])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread(values: Sequence[float], form: str) -> str:
    """`0.812 ± 0.010`: mean and standard deviation."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def run(arguments: argparse.Namespace) -> None:
    """Data, pretraining, fine-tuning, table."""
    for key in ("data", "output"):
        setattr(arguments, key, getattr(arguments, key).resolve())
    for key in ("text", "held_out"):
        setattr(arguments, key, [str(Path(path).resolve()) for path in getattr(arguments, key)])
    sources = {key: getattr(arguments, key) for key in ("text", "held_out", "vocab_size")}
    agree_on_sources(arguments.output, sources)
    prepare_data(arguments)
    shares = share_out(arguments)
    pretrain(arguments, shares)
    finetune(arguments)
    text = table(arguments, shares)
    (arguments.output / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
