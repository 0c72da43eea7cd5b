"""What a checkpoint of thousands of ranks asks of a rank: its index merged, written, read, and looked through.

Simulated: the pieces that ZeRO-3 leaves each of so many ranks of a preset, no tensors. What every rank of a save sends,
and rank 0 makes of it; what a start reads once and tells all ranks; and how long a rank of another number of ranks
takes to find its elements in it. Every element is counted.

examples:
  python benchmarks/checkpoint_scale.py
  python benchmarks/checkpoint_scale.py --config xxlarge --ranks 128 1024 4096
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.checkpoint.rank_file import KINDS, Piece, rank_file_name
from deberta_xl.checkpoint.rectangles import overlaps
from deberta_xl.checkpoint.stored_index import FilePieces, Layout, StoredIndex, from_bytes, merged, to_bytes
from deberta_xl.model.parts import masked_lm_parts
from deberta_xl.settings.presets import load_run_config

MIB = 2**20
VOCABULARY = 128_100
FOLDER = Path("step-00000001")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--config", default="xxlarge", help="preset (default: xxlarge)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 1024, 4096], help="default: 128 1024 4096")
    return parser.parse_args(arguments)


def layout_of(preset: str) -> Layout:
    """The parameters of a preset."""
    architecture = load_run_config(preset, []).model.architecture(VOCABULARY)
    parameters = dict(pair for part in masked_lm_parts(architecture) for pair in part.named_parameters())
    return Layout([*parameters], [tuple(parameter.shape) for parameter in parameters.values()])


def pieces_of_rank(layout: Layout, rank: int, ranks: int) -> FilePieces:
    """What ZeRO-3 leaves a rank: equal ranges of every parameter, the last ones shorter, or none."""
    sizes = np.array([math.prod(shape) for shape in layout.shapes], np.int64)
    share = -(-sizes // ranks)
    offset_P = np.minimum(rank * share, sizes)
    size_P = np.minimum(share, sizes - offset_P)
    number_P = np.flatnonzero(size_P).astype(np.int32)
    whole_P = np.full(len(number_P), -1, np.int8)
    return FilePieces(0, 1, number_P, whole_P, offset_P[number_P], size_P[number_P])


def look_through(index: StoredIndex, layout: Layout, pieces: FilePieces) -> int:
    """Find a rank's elements as loading does; how many there are."""
    found = 0
    for number, offset, size in zip(pieces.number_P, pieces.offset_P, pieces.size_P, strict=True):
        wanted = Piece(layout.names[number], layout.shapes[number], int(offset), int(size))
        for _ in KINDS:
            rectangles, copied = wanted.rectangles, 0
            for candidate in index.look_up(wanted.name, rectangles):
                copied += sum(one.rows * one.columns for one in overlaps(candidate.rectangles, rectangles))
            assert copied == size, f"{copied} of {size} elements of {wanted.name} found"
        found += int(size)
    return found


def run(arguments: argparse.Namespace) -> None:
    """Measure and tell."""
    layout = layout_of(arguments.config)
    print(f"{arguments.config}: {len(layout.names)} parameters", flush=True)
    for ranks in arguments.ranks:
        files = [FOLDER / rank_file_name(rank) for rank in range(ranks)]
        of_files = [pieces_of_rank(layout, rank, ranks) for rank in range(ranks)]
        sent = sum(column.nbytes for column in of_files[0][2:])
        start = time.process_time()
        content = to_bytes(merged(files, layout, of_files))
        made = time.process_time()
        index = from_bytes(FOLDER, content)
        read = time.process_time()
        others = ranks * 3 // 4  # another layout, whose borders are elsewhere
        look_through(index, layout, pieces_of_rank(layout, others // 2, others))
        done = time.process_time()
        num_pieces = sum(len(one.number_P) for one in of_files)
        print(
            f"{ranks:5} ranks: {num_pieces:9,} pieces; each sends {sent / 1024:.0f} KiB, "
            f"rank 0 makes {len(content) / MIB:.1f} MiB of it in {made - start:.2f} s; read in {read - made:.2f} s; "
            f"a rank of {others} finds its elements in {done - read:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
