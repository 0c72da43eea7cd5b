"""One table over fine-tuning runs: for each task and setting, mean, deviation and best over the seeds.

RUNS are run folders, or quoted patterns of them. Runs that differ only in their seed (and folder) are one row; what
distinguishes the rows is in their names.

example:
  python tools/table.py 'runs/sweep/*' --split valid
"""

from __future__ import annotations

import argparse
import glob
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, complain, run_tool
from deberta_xl.base.errors import UserError
from deberta_xl.base.output_file import check_output, write_output
from deberta_xl.base.strict import own_path
from deberta_xl.settings.files import read_toml
from deberta_xl.tasks.task import SMALLER_IS_BETTER

IGNORED = {("run", "folder"), ("train", "seed")}


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    settings: dict[tuple[str, str], Any]
    """Section and key -> value, without seed and folder."""
    results: dict[str, Any]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", type=own_path, metavar="RUNS", nargs="+", help="run folders or patterns")
    parser.add_argument("--split", default="valid", help="default: valid")
    parser.add_argument("--output", type=Path, help="write the table as Markdown to this file, too")
    return parser.parse_args(arguments)


def read_run(folder: Path) -> Run | None:
    """A run that has ended, None for any other folder."""
    results = folder / "results.json"
    if not results.is_file():
        return None
    tree = read_toml(folder / "config.toml")
    settings = {(section, key): value for section, values in tree.items() for key, value in values.items()}
    kept = {key: value for key, value in settings.items() if key not in IGNORED}
    return Run(folder, kept, json.loads(results.read_text(encoding="utf-8")))


def read_runs(patterns: Sequence[str]) -> list[Run]:
    """All finished runs; the others are named. Raises UserError when there are none."""
    folders = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) if Path(path).is_dir()]
    runs = {folder: read_run(folder) for folder in folders}
    unfinished = [str(folder) for folder, run in runs.items() if run is None]
    if unfinished:
        complain(f"warning: {len(unfinished)} folders have no results.json yet: {', '.join(unfinished)}")
    found = [run for run in runs.values() if run is not None]
    if not found:
        raise UserError(f"no finished fine-tuning run in {', '.join(patterns)}")
    return found


def distinguishing_keys(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The settings in which the runs of a task differ."""
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def rows_of(runs: Sequence[Run], split: str) -> list[list[str]]:
    """The table's rows: task, setting, metric, number of seeds, mean, deviation, best and its run."""
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.results["task"]].append(run)
    rows = []
    for task, of_task in sorted(by_task.items()):
        keys = distinguishing_keys(of_task)
        groups: dict[str, list[Run]] = defaultdict(list)
        for run in of_task:
            name = ", ".join(f"{section}.{key}={run.settings.get((section, key))}" for section, key in keys)
            groups[name or "–"].append(run)
        for name, group in sorted(groups.items()):
            rows += metric_rows(task, name, group, split)
    return rows


def metric_rows(task: str, name: str, runs: Sequence[Run], split: str) -> list[list[str]]:
    """A row for each metric of a group of seeds."""
    rows = []
    for metric in dict.fromkeys(metric for run in runs for metric in run.results["metrics"].get(split, {})):
        pairs = [(run.results["metrics"].get(split, {}).get(metric), run.folder.name) for run in runs]
        known = [(value, folder) for value, folder in pairs if value is not None]
        if not known:
            rows.append([task, name, metric, f"0 of {len(pairs)}", "undefined", "", ""])
            continue
        values = [value for value, _ in known]
        deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"
        best = min(known) if metric in SMALLER_IS_BETTER else max(known)
        count = str(len(values)) if len(values) == len(pairs) else f"{len(values)} of {len(pairs)}"
        rows.append(
            [task, name, metric, count, f"{statistics.mean(values):.4f}", deviation, f"{best[0]:.4f} ({best[1]})"]
        )
    return rows


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    runs = read_runs(arguments.runs)
    if arguments.output is not None:
        check_output(arguments.output, [run.folder for run in runs])
    splits = sorted({split for run in runs for split in run.results["metrics"]})
    if arguments.split not in splits:
        raise UserError(f"--split {arguments.split}: the runs have measured {', '.join(splits)}")
    header = ["task", "setting", "metric", "seeds", "mean", "deviation", "best (run)"]
    rows = [header, ["---"] * len(header), *rows_of(runs, arguments.split)]
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
    print(text, end="")
    if arguments.output is not None:
        write_output(arguments.output, text)


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), outputs=lambda given: filter(None, [given.output])))
