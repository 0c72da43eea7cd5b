"""Convert a pretrained model between layouts: ours (native), Hugging Face's, the original release's (microsoft).

SOURCE is a run folder (its newest whole checkpoint), a step folder, a weights folder, a Hugging Face or Microsoft
folder (DeBERTa v1, v2 or v3; safetensors or .bin, whole or in shards), or one file of weights with its configuration
beside it. DESTINATION is a new folder, which appears whole or not at all. Tensors pass through memory one at a time.

What comes out:
  native       weights folder for train.init and DebertaForMaskedLM.from_pretrained; no optimizer state
  huggingface  AutoModel, AutoTokenizer and AutoModelForMaskedLM load it; what transformers has no place for (absolute
               positions, other heads) travels along, so the way back loses nothing
  microsoft    model_config.json, pytorch_model.bin, spm.model for the original code

A discriminator with its generator (a run of train.objective=replaced_tokens, a v3 release) is converted as the two;
SOURCE/discriminator and SOURCE/generator convert one of them.

A fine-tuned model (deberta_xl/finetune.py) goes --to huggingface with its head, for AutoModelForSequenceClassification
and its kin; what transformers has fine-tuned, DebertaForTask.from_pretrained reads as it is.

examples:
  python tools/convert.py --to huggingface runs/first exported --verify --model_card
  python tools/convert.py --to native downloads/deberta-v3-large start
  python tools/convert.py --to huggingface runs/v3/discriminator exported
  python tools/convert.py --to native runs/first averaged --average 5
  python tools/convert.py --to native runs/first longer --max_position_embeddings 2048 --max_relative_positions 2048
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import get_args

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.durations import duration
from deberta_xl.base.output_file import check_output_folder
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.tensor_files import DTYPES as STORED_DTYPES
from deberta_xl.conversion.card_metadata import KEYS, read_metadata
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.edits import Edits
from deberta_xl.conversion.task_export import export_task
from deberta_xl.conversion.verify import TOLERANCES
from deberta_xl.weights.finetuned_folder import BEST_NAME, find_finetuned
from deberta_xl.weights.head_facts import HEAD_NAME
from deberta_xl.weights.pretrained_folder import Kind

DTYPES = {"float32": STORED_DTYPES["F32"], "bfloat16": STORED_DTYPES["BF16"], "float16": STORED_DTYPES["F16"]}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    kinds = get_args(Kind)
    parser.add_argument("--from", dest="source_kind", choices=kinds, help="layout of SOURCE (default: found out)")
    parser.add_argument("--to", choices=kinds, required=True, help="layout of DESTINATION")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as they are stored)")
    parser.add_argument(
        "--max_shard_size", type=parse_size, metavar="SIZE", help="largest file of weights, e.g. 500MB (default: 5GB)"
    )
    parser.add_argument("--model_card", action="store_true", help="write README.md for the Hub (--to huggingface)")
    parser.add_argument(
        "--card", action="append", default=[], metavar="KEY=VALUE",
        help=f"what the card states, or a TOML file of it: {', '.join(KEYS)} (lists by commas); writes the card",
    )  # fmt: skip
    parser.add_argument("--generator", type=Path, help="generator of a v3 discriminator (default: the one beside it)")
    check = parser.add_argument_group("comparison of the result with the source, layer by layer")
    check.add_argument("--verify", action="store_true", help="run one text through both; refuse a result that differs")
    check.add_argument(
        "--tolerance", type=float, metavar="SHARE", help="largest difference allowed, as a share of the largest value"
    )
    change = parser.add_argument_group("changes on the way (docs/conversion.md has their rules)")
    change.add_argument("--average", type=int, metavar="K", help="mean of the newest K checkpoints of a run folder")
    change.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer folder with other pieces: rows follow their pieces, new ones are the mean of their old pieces",
    )
    change.add_argument("--vocab_size", type=int, help="more rows in the word table, each the mean of the others")
    change.add_argument("--max_position_embeddings", type=int, help="longer sequences")
    change.add_argument("--max_relative_positions", type=int, help="farther distances told apart")
    change.add_argument("--position_buckets", type=int, help="more buckets of relative positions")
    change.add_argument("--num_layers", type=int, help="fewer layers, evenly spaced, the first and the last kept")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder, or file of weights")
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="folder to write")
    parsed = parser.parse_args(arguments)
    if parsed.tolerance is not None and not parsed.verify:
        parser.error("--tolerance needs --verify")
    return parsed


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 5GB, 500MB or 1GiB")
    return size


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say what came out."""
    started = time.monotonic()
    check_output_folder(arguments.destination, option="DESTINATION")
    if is_fine_tuned(arguments.source):
        refuse_for_tasks(arguments)
        export_task(find_finetuned(arguments.source), arguments.destination, read_conversion(arguments))
    else:
        convert(arguments.source, arguments.destination, read_conversion(arguments))
    files = sorted(path for path in arguments.destination.rglob("*") if path.is_file())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    names = ", ".join(file.relative_to(arguments.destination).as_posix() for file in files)
    print(f"{arguments.destination}: {megabytes:,.1f} MB in {duration(time.monotonic() - started)}: {names}")


def is_fine_tuned(source: Path) -> bool:
    """Whether a source is a model of ours with a head for a task."""
    return (source / HEAD_NAME).is_file() or (source / BEST_NAME / HEAD_NAME).is_file()


def refuse_for_tasks(arguments: argparse.Namespace) -> None:
    """Raise CheckpointError for what a fine-tuned model has not, or has already."""
    if arguments.to != "huggingface":
        raise CheckpointError(
            f"--to {arguments.to}: {arguments.source} is fine-tuned for a task; it goes --to huggingface only"
        )
    options = {name: getattr(arguments, name) for name in Edits.__dataclass_fields__}
    options["generator"] = arguments.generator
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise CheckpointError(
            f"{', '.join(given)}: not for a fine-tuned model; convert the pretrained one, or leave out"
        )


def read_conversion(arguments: argparse.Namespace) -> Conversion:
    """What is asked for."""
    dtype = DTYPES.get(arguments.dtype)
    tolerance = TOLERANCES[dtype] if arguments.tolerance is None else arguments.tolerance
    changes = {name: getattr(arguments, name) for name in Edits.__dataclass_fields__}
    return Conversion(
        to=arguments.to,
        source_kind=arguments.source_kind,
        dtype=dtype,
        edits=Edits(**changes),
        shard_bytes=arguments.max_shard_size,
        generator=arguments.generator,
        with_card=arguments.model_card or bool(arguments.card),
        metadata=read_metadata(arguments.card),
        tolerance=tolerance if arguments.verify else None,
        show=print,
    )


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), outputs=lambda given: [given.destination]))
