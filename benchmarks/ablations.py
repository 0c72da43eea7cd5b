r"""The ablation of the paper (arXiv 2006.03654, section 5.2) at small size: what do EMD and each position term give?

One small encoder is pretrained as it is, without the enhanced mask decoder, and without content-to-position,
position-to-content, or both: the same text, batches, masks, seeds and number of steps for all. Each is judged by the
masked tokens of the held-out text and, with --tasks, by fine-tuning. Each run is one ordinary command, which is shown;
what is finished is not made again, so the same command goes on. The table goes to OUTPUT/table.md.

TEXT and HELD_OUT are .txt or .jsonl files, or folders of such; or give datasets that tools/preprocess.py has made.

examples:
  python benchmarks/ablations.py --text wikitext/valid.txt --held_out wikitext/test.txt --output runs/ablations
  python benchmarks/ablations.py --train data/train --valid data/valid --output runs/own --steps 3000 --seeds 1 2 3
  python benchmarks/ablations.py --text books --held_out news.txt --output runs/tasks --tasks trec sick --data DATA
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from benchmarks import objectives
from benchmarks.real_tasks import ROOT, TASKS, agree_on_sources, run_all
from deberta_xl.base.errors import UserError
from deberta_xl.base.strict import at_least, own_path

TEXT_ENDINGS = (".txt", ".jsonl")


class Variation(NamedTuple):
    """A model without a piece of it."""

    words: str
    """As the table calls it."""
    overrides: tuple[str, ...] = ()


VARIATIONS = {
    "full": Variation("all of it"),
    "no_emd": Variation("– EMD", ("model.decoder_passes=0",)),
    "no_c2p": Variation("– c2p", ("model.pos_att_type=p2c",)),
    "no_p2c": Variation("– p2c", ("model.pos_att_type=c2p",)),
    "no_emd_c2p": Variation("– (EMD + c2p)", ("model.decoder_passes=0", "model.pos_att_type=p2c")),
    "no_emd_p2c": Variation("– (EMD + p2c)", ("model.decoder_passes=0", "model.pos_att_type=c2p")),
    "no_c2p_p2c": Variation("– (c2p + p2c)", ("model.pos_att_type=none",)),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--text", type=own_path, nargs="+", help="what to pretrain on: files, or folders of such")
    parser.add_argument("--held_out", type=own_path, nargs="+", help="what to judge by")
    parser.add_argument("--train", metavar="DATASET", type=own_path, help="instead of --text: the prefix of a dataset")
    parser.add_argument("--valid", metavar="DATASET", type=own_path, help="instead of --held_out")
    parser.add_argument("--output", type=Path, required=True, help="where everything goes")
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=list(VARIATIONS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--steps", type=int, default=1000, help="of pretraining, 32 rows of 128 tokens (default: 1000)")
    parser.add_argument("--vocab_size", type=int, default=8000, help="of the tokenizer of --text (default: 8000)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[], help="to fine-tune on (default: none)")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task (benchmarks/real_tasks.py)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, and make paths whole. Raises UserError."""
    at_least(1, steps=arguments.steps, vocab_size=arguments.vocab_size, jobs=arguments.jobs)
    given = [value is not None for value in (arguments.text, arguments.held_out, arguments.train, arguments.valid)]
    if given not in ([True, True, False, False], [False, False, True, True]):
        raise UserError("give either --text and --held_out, or --train and --valid, which tools/preprocess.py has made")
    if arguments.tasks and arguments.data is None:
        raise UserError("--tasks needs --data: the folder with a folder for each task")
    arguments.output = arguments.output.resolve()
    arguments.data = arguments.data and arguments.data.resolve()
    if arguments.train is not None:
        agree_on_sources(arguments.output, {key: getattr(arguments, key) for key in ("train", "valid")})
    else:
        arguments.text, arguments.held_out = map(text_files, (arguments.text, arguments.held_out))
        arguments.train, arguments.valid = (str(arguments.output / "data" / name) for name in ("train", "valid"))
        sources = {key: getattr(arguments, key) for key in ("text", "held_out", "vocab_size")}
        agree_on_sources(arguments.output, sources)
        objectives.prepare_data(arguments)


def text_files(paths: list[str]) -> list[str]:
    """The files among these, and those in the folders among them. Raises UserError for a folder without any."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in TEXT_ENDINGS)
        if not found:
            raise UserError(f"{path} has no files that end in {' or '.join(TEXT_ENDINGS)}")
        files += [str(file.resolve()) for file in found]
    return files


def pretraining_command(arguments: argparse.Namespace, name: str, seed: int) -> list[str]:
    """Of one run."""
    steps = arguments.steps
    settings = [
        "--config", "debug", *objectives.ENGINE, f"data.train={Path(arguments.train).resolve()}",
        f"data.valid={Path(arguments.valid).resolve()}", f"run.folder={objectives.run_folder(arguments, name, seed)}",
        f"train.seed={seed}", f"train.steps={steps}", f"schedule.warmup_steps={round(objectives.WARMUP_SHARE * steps)}",
        *objectives.COMMON_PRETRAINING, *VARIATIONS[name].overrides,
    ]  # fmt: skip
    return ["python", "deberta_xl/pretrain.py", *settings]


def unfinished(arguments: argparse.Namespace) -> list[list[str]]:
    """The commands of the pretraining runs that have not ended. Raises UserError for one of other steps."""
    commands = []
    for seed in arguments.seeds:
        for name in arguments.variations:
            folder = objectives.run_folder(arguments, name, seed)
            if objectives.is_done(folder):
                objectives.check_steps(folder, arguments.steps)
            else:
                commands.append(pretraining_command(arguments, name, seed))
    return commands


def finetune(arguments: argparse.Namespace) -> None:
    """Every encoder on every task."""
    seeds, tasks = arguments.seeds, arguments.tasks
    places = [(name, seed, task) for seed in seeds for task in tasks for name in arguments.variations]
    left = [p for p in places if not (objectives.run_folder(arguments, *p) / "results.json").exists()]
    run_all([objectives.finetuning_command(arguments, *place) for place in left], arguments.jobs)


def judge(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Loss and accuracy at the masked tokens of the held-out text, by tools/evaluate.py; kept beside the run."""
    folder = objectives.run_folder(arguments, name, seed)
    kept = folder / "held_out.json"
    if not kept.exists():
        command = ["tools/evaluate.py", folder, Path(arguments.valid).resolve()]
        said = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE
        ).stdout
        kept.write_text(said.strip().splitlines()[-1] + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def table(arguments: argparse.Namespace) -> str:
    """Everything in Markdown: means over the seeds, and how far those are apart."""
    found = {
        (name, task): [
            objectives.task_result(objectives.run_folder(arguments, name, seed, task)) for seed in arguments.seeds
        ]
        for name in arguments.variations
        for task in arguments.tasks
    }
    first = arguments.variations[0]
    metrics = [f"{task} ({found[first, task][0][0]})" for task in arguments.tasks]
    rows = [["model", "held-out loss", "held-out accuracy", *metrics]]
    rows.append(["---"] * len(rows[0]))
    for name in arguments.variations:
        judged = [judge(arguments, name, seed) for seed in arguments.seeds]
        figures = [objectives.spread([run[key] for run in judged], ".3f") for key in ("loss", "accuracy")]
        tasks = [objectives.spread([value for _, value in found[name, task]], ".3f") for task in arguments.tasks]
        rows.append([VARIATIONS[name].words, *figures, *tasks])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def run(arguments: argparse.Namespace) -> None:
    """Data, pretraining, fine-tuning, table."""
    check_arguments(arguments)
    run_all(unfinished(arguments), arguments.jobs)
    finetune(arguments)
    text = table(arguments)
    (arguments.output / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
