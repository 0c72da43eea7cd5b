"""Proof that a change of structure leaves every number alone, bit for bit.

Short runs of pretraining and fine-tuning on tiny sizes, with evaluations, predictions and resumed runs, each started by
what a user types. Of each the file keeps every step's figures (exact, as float.hex), the SHA-256 of every weight of the
last checkpoint and of every file of predictions. Times are left out. The same code gives the same file on the same
machine with the same libraries.

examples:
  python tests/unchanged.py write /tmp/before.json            # on the commit before the change
  python tests/unchanged.py compare /tmp/before.json          # on the one after it; exit 1 when a case differs
  python tests/unchanged.py compare /tmp/before.json --only tp2
  python tests/unchanged.py --list
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import platform
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's package, wherever another one is installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from ranks import RankError, run_ranks
from safetensors.numpy import load_file
from unchanged_cases import ENCODER, PREPARATIONS, Case, Command, all_cases, write_files

import deberta_xl

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("_seconds", "_per_second", "_utilization", "memory_gib")
"""How the names of figures end that no two runs have in common."""
SECONDS = 300.0
STDOUT, STDERR = "stdout.txt", "stderr.txt"
SPEAKERS = ("tools/evaluate.py", "tools/evaluate_task.py", "tools/fill_mask.py")
"""Scripts whose standard output is the same each time."""
OUTPUTS = ("output", "predicted.jsonl")
"""What the tools write in a case's folder."""
WEIGHTS = ("weights/model.safetensors", "run/best/model.safetensors")
"""Where a case leaves its last weights, gathered and in full precision."""
SHOWN_LINES = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    given = parse_arguments(arguments)
    cases = [case for case in all_cases() if given.only in case.name]
    if not cases:
        return refuse(f"no case has {given.only!r} in its name; --list shows all")
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    if given.action == "compare":
        return compare(given.file, cases, is_whole=not given.only)
    found = measure(cases)
    if failed := [case.name for case in cases if case.name not in found]:
        return refuse(f"nothing is written, since these fail: {', '.join(failed)}")
    twins = unlike_their_twins(cases, found)
    given.file.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*twins, f"{given.file}: {len(found)} cases"]))
    return int(bool(twins))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("action", nargs="?", choices=("write", "compare"), help="what to do with FILE")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="JSON file of figures and digests")
    parser.add_argument("--only", default="", metavar="PART", help="the cases with this in their name")
    parser.add_argument("--list", action="store_true", help="show the names of the cases, then exit")
    given = parser.parse_args(arguments)
    if given.file is None and not given.list:
        parser.error("write FILE or compare FILE")
    if given.action == "compare" and not given.list and not given.file.is_file():
        parser.error(f"{given.file} is not there; write it on the commit before the change")
    return given


def refuse(reason: str) -> int:
    """Say why not; the exit status."""
    print(f"error: {reason}", file=sys.stderr)
    return 2


def machine() -> dict[str, str]:
    """What the numbers may depend on besides the code."""
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ---- running -------------------------------------------------------------------------------------------------------


def measure(cases: Sequence[Case]) -> dict[str, Any]:
    """What each case leaves behind, by its name; those that fail are told at once and left out."""
    import_everything()
    found = {}
    with tempfile.TemporaryDirectory(prefix="unchanged-") as name:
        folder = Path(name)
        found["data"] = prepare(folder / "data")
        is_pretraining = all(case.name.startswith("mlm") for case in cases)
        for case in cases if is_pretraining else [ENCODER, *cases]:
            started = time.monotonic()
            try:
                found[case.name] = run_case(case, folder / case.name)
                outcome = ""
            except RankError as error:
                outcome = f"  FAILS\n{error}"
            print(f"{case.name:40} {time.monotonic() - started:5.1f} s{outcome}", flush=True)
    return found


def import_everything() -> None:
    """Import the package here, once, instead of in every rank that is forked from here."""
    for module in pkgutil.walk_packages(deberta_xl.__path__, "deberta_xl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def prepare(folder: Path) -> dict[str, Any]:
    """Make the files that the cases read; the digests of the dataset."""
    write_files(folder)
    for command in PREPARATIONS:
        obey(command, folder)
    return {"files": digests(folder, ["train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer/spm.model"])}


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Give a case's commands; the figures of each step, and digests of weights, predictions and what was said."""
    folder.mkdir()
    said = {}
    for command in case.commands:
        obey(command, folder)
        if command.script in SPEAKERS:
            said[command.script] = digest((folder / STDOUT).read_bytes())
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "steps": read_figures(folder / "run" / "metrics.jsonl"),
        "weights": read_weights(folder),
        "files": digests(folder, [path.as_posix() for path in files if is_prediction(path)]),
        "said": said,
    }


def is_prediction(path: Path) -> bool:
    """Whether a file of a case holds what a model says of texts."""
    return path.parts[:2] in (("run", "predictions"), ("run", "results.json")) or path.parts[0] in OUTPUTS


def obey(command: Command, folder: Path) -> None:
    """Give a command in a folder, on forked ranks; what it says goes to files there.

    Raises RankError with the end of what it said when it fails.
    """
    for name in (STDOUT, STDERR):
        (folder / name).write_bytes(b"")
    try:
        run_ranks(start, command.ranks, command, folder, backend=None, timeout=SECONDS)
    except RankError as error:
        said = "".join((folder / name).read_text(encoding="utf-8") for name in (STDOUT, STDERR))
        typed = " ".join(["python", command.script, *command.arguments])
        raise RankError("\n".join([typed, *said.splitlines()[-SHOWN_LINES:], str(error)])) from None


def start(command: Command, folder: Path) -> None:
    """The life of one rank: the script as Python would start it, in `folder`."""
    os.chdir(folder)
    for stream, name in ((1, STDOUT), (2, STDERR)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, encoding="utf-8", closefd=False) for stream in (1, 2))
    script = ROOT / command.script
    sys.argv = [str(script), *command.arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit status {end.code}") from None


def read_figures(path: Path) -> dict[str, dict[str, str]]:
    """Step -> name -> exact value of all that a run has logged, but times."""
    steps: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        of_step = steps.setdefault(str(values.pop("step")), {})
        of_step |= {name: float(value).hex() for name, value in values.items() if not name.endswith(TIMES)}
    return steps


def read_weights(folder: Path) -> dict[str, str]:
    """Digest of each weight that a case has left behind."""
    found = {file: load_file(folder / file) for file in WEIGHTS if (folder / file).is_file()}
    assert found, f"{folder} has no weights"
    return {
        f"{Path(file).parent}: {name}": digest(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
        for file, arrays in found.items()
        for name, array in sorted(arrays.items())
    }


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> SHA-256 of files in a folder."""
    return {name: digest((folder / name).read_bytes()) for name in names}


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare(file: Path, cases: Sequence[Case], *, is_whole: bool) -> int:
    """Measure again, and list every case that is not what the file has; the exit status."""
    written = json.loads(file.read_text(encoding="utf-8"))
    for name, value in machine().items():
        if written["machine"][name] != value:
            print(f"warning: {file} was written with {name} {written['machine'][name]}, here is {value}")
    found = measure(cases)
    twins = unlike_their_twins(cases, found)
    chosen = {case.name for case in cases}
    names = [name for name in {**written["cases"], **found} if is_whole or name in chosen or name in found]
    complaints = [line for name in names for line in differences(name, written["cases"].get(name), found.get(name))]
    for line in [*complaints, *twins]:
        print(line)
    num_different = len({line.partition(":")[0] for line in complaints})
    print(f"{num_different} of {len(names)} cases differ" if num_different else f"{len(names)} cases, all unchanged")
    return int(bool(complaints or twins))


def differences(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Iterator[str]:
    """A line for each kind of thing that differs in a case. A figure that is new is no difference."""
    if before is None or after is None:
        yield f"{name}: only in the file (fails here, or is gone)" if before else f"{name}: not in the file"
        return
    yield from map(f"{name}: {{}}".format, different_steps(before.get("steps", {}), after.get("steps", {})))
    for kind in ("weights", "files", "said"):
        old, new = before.get(kind, {}), after.get(kind, {})
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            yield f"{name}: {kind}: {len(changed)} of {len({*old, *new})} differ, the first is {changed[0]}"


def different_steps(before: Mapping[str, dict[str, str]], after: Mapping[str, dict[str, str]]) -> Iterator[str]:
    """One line for the first step that differs, with both values of each figure."""
    steps = sorted({*before, *after}, key=int)
    for step in steps:
        old, new = before.get(step, {}), after.get(step, {})
        changed = [key for key in old if old[key] != new.get(key)]
        if changed:
            values = ", ".join(f"{key} {shown(old[key])} -> {shown(new.get(key))}" for key in changed)
            yield f"first at step {step} of {steps[-1]}: {values}"
            return
        if not old:
            yield f"first at step {step}, which was not there before"
            return


def shown(value: str | None) -> str:
    """A figure in decimal digits, all of them."""
    return "missing" if value is None else repr(float.fromhex(value))


def unlike_their_twins(cases: Sequence[Case], found: Mapping[str, Any]) -> list[str]:
    """A line for each difference between two cases of `found` that have to be equal."""
    pairs = [(case, found.get(case.equals)) for case in cases if case.equals in found]
    return [
        line
        for case, twin in pairs
        for line in differences(f"{case.name} is not {case.equals}", twin, found[case.name])
    ]


if __name__ == "__main__":
    sys.exit(main())
