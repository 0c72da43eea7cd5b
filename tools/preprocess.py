"""Tokenise text files into a dataset for pretraining: PREFIX.bin, .idx, .manifest.json and PREFIX.tokenizer/.

Input files are .txt (documents separated by blank lines, or as --documents says) or .jsonl (one document per line),
each also .gz or .zst. The output has the format of Megatron's indexed datasets. Records that hold no text are skipped,
counted and reported with file and line. Literal special tokens in the text, such as the letters [MASK], are tokenised
like any other text.

The output is the same for any number of workers, and of processes under MPI. Those share the input files out, so there
should be more files than processes; the output must be on a file system that all nodes see.

examples:
  python tools/preprocess.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer/ --output data/wiki --workers 16
  python tools/preprocess.py --input book.txt --tokenizer tokenizer/ --output data/train \\
      --valid_output data/valid --valid_share 0.05
  mpirun -n 16 python -m mpi4py tools/preprocess.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer/ \\
      --output data/wiki
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, report_bad_records, run_tool
from deberta_xl.base.durations import duration
from deberta_xl.base.errors import DataError, counted
from deberta_xl.base.launch import read_launch
from deberta_xl.base.output_file import check_output_folder, is_stream
from deberta_xl.base.progress import progress
from deberta_xl.base.strict import own_path
from deberta_xl.corpus.characters import listed
from deberta_xl.corpus.documents import DOCUMENTS
from deberta_xl.corpus.preprocessing import Preprocessing, Summary, preprocess
from deberta_xl.corpus.reading import expand_inputs, total_size
from deberta_xl.corpus.spread_preprocessing import Communicator, preprocess_spread
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.token_store_format import dataset_paths
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.words import LONGEST_WORD

#: Share of unknown tokens above which the tokenizer does not suit the text.
MANY_UNKNOWN = 0.01
SHOWN_CHARACTERS = 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files, or quoted patterns")
    parser.add_argument(
        "--tokenizer",
        type=own_path,
        required=True,
        metavar="FOLDER",
        help="made by tools/train_tokenizer.py, or a released model's folder",
    )
    parser.add_argument("--output", type=own_path, required=True, metavar="PREFIX", help="dataset to write")
    parser.add_argument(
        "--valid_output", "--valid-output", type=own_path, metavar="PREFIX", help="held-out dataset to write as well"
    )
    parser.add_argument(
        "--valid_share",
        "--valid-share",
        type=float,
        default=0.05,
        help="share of the documents held out, chosen by a hash of their text (default: 0.05, as in the paper)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help=f"processes (default: one per core, {cores} here; one in each of MPI's)",
    )
    parser.add_argument(
        "--documents",
        choices=DOCUMENTS,
        default="blank_lines",
        help="where a document ends: "
        + "; ".join(f"{name}: {meaning}" for name, meaning in DOCUMENTS.items())
        + ". In .json and .jsonl every record is one, which parts cuts (default: blank_lines)",
    )
    parser.add_argument("--json_key", "--json-key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record instead of skipping it")
    parser.add_argument("--overwrite", action="store_true", help="replace existing datasets")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Tokenise, read the result back, and say what came out."""
    communicator = find_communicator()
    workers = arguments.workers or (1 if communicator else len(os.sched_getaffinity(0)))
    check(arguments)
    started = time.monotonic()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    paths = expand_inputs(arguments.input)
    size = communicator.Get_size() if communicator else 1
    # Under MPI the first process sees its own share of the input only.
    with progress("tokenising", total_size(paths) // size) as advance:
        plan = Preprocessing(
            tokenizer,
            arguments.output,
            arguments.valid_output,
            arguments.valid_share if arguments.valid_output else 0.0,
            json_key=arguments.json_key,
            documents=arguments.documents,
            workers=workers,
            strict=arguments.strict,
            overwrite=arguments.overwrite,
            advance=advance,
        )
        summary = preprocess_spread(paths, plan, communicator) if communicator else preprocess(paths, plan)
    if communicator and communicator.Get_rank():
        return
    report_bad_records(summary.bad_records, summary.reported)
    for prefix in filter(None, (arguments.output, arguments.valid_output)):
        store = TokenStore(prefix)
        print(f"{prefix}: {counted(len(store), 'document')}, {store.num_tokens:,} tokens, read back")
    report(summary, time.monotonic() - started)


def find_communicator() -> Communicator | None:
    """MPI's processes, where `python -m mpi4py` started this one; MPI is not imported otherwise.

    Raises DataError under any launcher of several processes without it: each process would do everything, and one that
    fails would leave the others waiting.
    """
    is_mpi = "mpi4py" in sys.modules
    if is_mpi:
        from mpi4py import MPI

        if MPI.COMM_WORLD.Get_size() > 1:
            return MPI.COMM_WORLD
    if (started := read_launch().world_size) > 1:
        way_out = (
            "MPI finds none of the others: use the mpirun of the MPI that mpi4py is linked to, or srun with the "
            "--mpi=... that it speaks (pmix, pmi2)"
            if is_mpi
            else "start one, which has --workers, or under MPI: mpirun -n N python -m mpi4py tools/preprocess.py ..."
        )
        raise DataError(f"{started} processes were started, and each would do everything; {way_out}")
    return None


def check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that cannot be meant."""
    prefixes = [prefix for prefix in (arguments.output, arguments.valid_output) if prefix is not None]
    places = {dataset_paths(prefix).bin.resolve() for prefix in prefixes}
    if arguments.valid_output and not 0 < arguments.valid_share < 1:
        raise DataError(f"--valid_share {arguments.valid_share} is not a share; allowed: between 0 and 1")
    for prefix in prefixes:
        if is_stream(Path(prefix)):
            raise DataError(f"{prefix} is a device or a pipe; choose a prefix for the names of a dataset's files")
        check_output_folder(dataset_paths(prefix).bin.parent)
    if len(places) < len(prefixes):
        raise DataError(f"--output and --valid_output both name the dataset {arguments.output}; choose two prefixes")
    if arguments.workers is not None and arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers} is too few; allowed: 1 and more")


def outputs(arguments: argparse.Namespace) -> list[Path]:
    """What is written last of each dataset."""
    prefixes = filter(None, (arguments.output, arguments.valid_output))
    return [dataset_paths(prefix).manifest for prefix in prefixes]


def report(summary: Summary, seconds: float) -> None:
    """Print the summary."""
    share = summary.unknown_tokens / summary.tokens
    print(
        f"{sum(file['size'] for file in summary.inputs) / 1e6:,.1f} MB in {duration(seconds)}, "
        f"{summary.tokens / seconds:,.0f} tokens/s; skipped: {counted(summary.bad_records, 'bad record')}, "
        f"{counted(summary.empty_documents, 'document')} without tokens"
    )
    print(f"unknown tokens: {share:.3%}; literal special tokens kept as text: {summary.literal_specials:,}")
    if summary.unknown_characters:
        print(f"  characters behind them: {listed(dict(summary.unknown_characters.most_common()), SHOWN_CHARACTERS)}")
    words = summary.words
    in_parts = words.in_long_words / words.num_tokens
    print(
        f"words: {words.num_tokens / words.num_words:.2f} tokens on average, {words.longest:,} the longest; those of "
        f"more than {LONGEST_WORD}, {in_parts:.1%} of the tokens, are masked in parts"
    )
    if share > MANY_UNKNOWN:
        print(
            "warning: the tokenizer lacks many characters of this text; train one on it, or with --byte_fallback",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), outputs=outputs))
