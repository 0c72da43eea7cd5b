"""Convert a pretrained model to another layout.

SOURCE is a run folder (its newest whole checkpoint), a step folder or a weights folder. DESTINATION is a new folder,
which transformers loads with AutoModel, AutoTokenizer and AutoModelForMaskedLM; DebertaForMaskedLM.from_pretrained and
tools/fill_mask.py read it as well, with the enhanced mask decoder that transformers lacks.

example:
  python tools/convert.py --from native --to huggingface runs/first exported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from deberta_xl.checkpoint.export import export_huggingface
from deberta_xl.command_line import build_parser, run_tool

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--from", dest="source_layout", choices=["native"], default="native", help="layout of SOURCE")
    parser.add_argument("--to", choices=["huggingface"], default="huggingface", help="layout of DESTINATION")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of a run, checkpoint or weights")
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="folder to write")
    return parser.parse_args(arguments)


def convert(arguments: argparse.Namespace) -> None:
    """Convert, and say what came out."""
    export_huggingface(arguments.source, arguments.destination, dtype=DTYPES[arguments.dtype])
    megabytes = sum(file.stat().st_size for file in arguments.destination.iterdir()) / 1e6
    names = ", ".join(sorted(file.name for file in arguments.destination.iterdir()))
    print(f"{arguments.destination}: {megabytes:,.1f} MB: {names}")


if __name__ == "__main__":
    sys.exit(run_tool(convert, parse_arguments()))
