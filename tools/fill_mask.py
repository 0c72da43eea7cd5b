"""Ask a pretrained model what stands behind each [MASK] of a text.

CHECKPOINT is a run folder (its newest whole checkpoint), a step or weights folder, or a folder in the original
release's or Hugging Face's layout; of a run with a discriminator, runs/v3/generator is what fills masks. The model
answers through the enhanced mask decoder, as in pretraining. A piece that begins with ▁ begins a word; [MASK] is one
piece, so that a rare word takes several.

example:
  python tools/fill_mask.py runs/first "The capital of [MASK] is Paris." --top_k 5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.log import logger
from deberta_xl.public.fill_mask import Guess, fill_masks
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.weights.named_folder import tokenizer_for


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, checkpoint or weights")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="text with one or more [MASK]")
    parser.add_argument("--top_k", "--top-k", type=int, default=5, help="proposals for each mask (default: 5)")
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="tokenizer, if the checkpoint has none")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Load, fill and print."""
    model = DebertaForMaskedLM.from_pretrained(arguments.checkpoint)
    if model.learnt.objective in ("causal", "prefix"):
        logger.warning(
            "%s was never trained to fill masks (train.objective=%s): do not expect sense of what follows",
            arguments.checkpoint, model.learnt.objective,
        )  # fmt: skip
    tokenizer = tokenizer_for(arguments.checkpoint, arguments.tokenizer)
    filled = fill_masks(model, tokenizer, arguments.texts, top_k=arguments.top_k)
    for text, answers in zip(arguments.texts, filled, strict=True):
        for number, guesses in enumerate(answers, start=1):
            print(f"{text}  ([MASK] {number} of {len(answers)})")
            print(table(guesses))


def table(guesses: list[Guess]) -> str:
    """Rank, probability, piece and the filled text, a line each."""
    width = max(len("piece"), *(len(guess.piece) for guess in guesses))
    lines = [f"rank  probability  {'piece':{width}}  text"]
    for rank, guess in enumerate(guesses, start=1):
        lines.append(f"{rank:4}  {guess.probability:11.2%}  {guess.piece:{width}}  {guess.text}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
