"""How fast rows are masked: million tokens per second on one core, for both styles.

python benchmarks/masking.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser
from deberta_xl.data.masking import Masker
from deberta_xl.data.random_numbers import derive
from deberta_xl.settings.pretraining import DataSection

VOCAB_SIZE, MASK_ID = 128100, 128000
ROWS = 32
SECONDS = 3.0


def tokens_per_second(masker: Masker, sequence_length: int) -> float:
    """Tokens masked per second of processor time; the rows are full, two thirds of the tokens begin a word."""
    input_ids = np.random.default_rng(0).integers(4, MASK_ID, (ROWS, sequence_length))
    input_ids[:, 0], input_ids[:, -1] = 1, 2
    segments = np.ones_like(input_ids)
    started, batches = time.process_time(), 0
    while time.process_time() - started < SECONDS:
        masker.mask(input_ids, segments, derive(0, batches, np.arange(ROWS)))
        batches += 1
    return batches * input_ids.size / (time.process_time() - started)


def main() -> None:
    """Print a line per style and length."""
    special = np.zeros(VOCAB_SIZE, bool)
    special[:4] = special[MASK_ID:] = True
    word_starts = special | (np.random.default_rng(1).random(VOCAB_SIZE) < 2 / 3)
    for style in ("unbiased", "original"):
        masker = Masker(DataSection(masking=style), word_starts=word_starts, special=special, mask_id=MASK_ID)
        for length in (128, 512):
            speed = tokens_per_second(masker, length)
            print(f"{style:9} sequence_length {length:4}: {speed / 1e6:5.1f} million tokens/s on one core")


if __name__ == "__main__":
    build_parser(__doc__).parse_args()
    main()
