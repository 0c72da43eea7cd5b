"""Train a SentencePiece tokenizer with DeBERTa's special ids on your own text.

Input files are .txt (documents separated by blank lines) or .jsonl (one document per line), each also .gz or .zst.
The output folder holds spm.model and tokenizer_settings.json; tools/preprocess.py reads it, and copies it beside the
data it makes. The same text gives the same tokenizer on any machine.

example:
  python tools/train_tokenizer.py --input 'corpus/*.jsonl.zst' --vocab_size 128100 --output tokenizer/
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator

from deberta_xl.command_line import build_parser, report_bad_records, run_tool
from deberta_xl.data.corpus import expand_inputs, iterate_documents, total_size
from deberta_xl.data.progress import progress
from deberta_xl.data.tokenizer_training import MAX_LINES, train_tokenizer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files, or quoted patterns")
    parser.add_argument(
        "--vocab_size",
        "--vocab-size",
        type=int,
        required=True,
        help="rows of the model's word table: pieces + [MASK] + spare ids (100 ids are set aside from 10000 on, "
        "8 below). DeBERTa-v2 and v3 have 128100; 8000 suits a few MB of text",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--json_key", "--json-key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument(
        "--max_lines",
        "--max-lines",
        type=int,
        default=MAX_LINES,
        help=f"lines to hold in memory; of more, a random sample is used (default: {MAX_LINES})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace) -> None:
    """Train, and say what came out."""
    started = time.monotonic()
    paths = expand_inputs(arguments.input)
    bad: list[str] = []
    try:
        with progress("reading the text", total_size(paths)) as advance:
            texts = iterate_documents(paths, arguments.json_key, report=bad.append, advance=advance)
            tokenizer = train_tokenizer(
                announce(texts),
                arguments.vocab_size,
                arguments.output,
                max_lines=arguments.max_lines,
                overwrite=arguments.overwrite,
            )
    finally:  # when training fails, the bad records may be the reason
        report_bad_records(len(bad), bad[:10])
    spare = tokenizer.vocab_size - tokenizer.num_pieces - 1
    print(
        f"{arguments.output}: {tokenizer.vocab_size:,} ids = {tokenizer.num_pieces:,} pieces + [MASK] (id "
        f"{tokenizer.mask_id}) + {spare} spare ids, in {time.monotonic() - started:.0f} s"
    )


def announce(texts: Iterable[str]) -> Iterator[str]:
    """The texts; when they end, say that the silent part begins."""
    yield from texts
    print("training; this takes seconds for a few MB of text, up to hours for many GB", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_tool(train, parse_arguments()))
