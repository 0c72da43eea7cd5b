"""Ask a discriminator which tokens of a text were replaced: which do not belong there.

CHECKPOINT is a run folder of train.objective=replaced_tokens (its newest whole checkpoint), a step or weights folder,
or a v3 in the original release's or Hugging Face's layout. On a terminal the tokens found are coloured; elsewhere they
stand in [[double brackets]]. Below the text are their probabilities, or the most suspicious token when none is found.

examples:
  python tools/detect.py runs/v3 "The capital of France is banana."
  python tools/detect.py runs/v3 "Die Hauptstadt von Frankreich ist Banane." --threshold 0.2 --json
  python tools/detect.py runs/v3 < sentences.txt
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.errors import ConfigError
from deberta_xl.public.detection import DebertaForDetection, Found, JudgedToken, detect_all, stretches
from deberta_xl.tasks.text_files import open_text
from deberta_xl.weights.named_folder import tokenizer_for

STANDARD_INPUT = Path("/dev/stdin")
PLAIN = ("[[", "]]")
COLOURED = ("\x1b[1;4;31m", "\x1b[0m")
"""Bold, underlined and red."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, checkpoint or weights")
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="text to look through (default: each line of stdin)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability to be found (default: 0.5)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each text, with all of its tokens")
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="tokenizer, if the checkpoint has none")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Load, judge and print."""
    if not 0 < arguments.threshold < 1:
        raise ConfigError(f"--threshold {arguments.threshold} is no probability; choose one between 0 and 1, like 0.5")
    texts = arguments.texts or read_lines()
    model = DebertaForDetection.from_pretrained(arguments.checkpoint)
    tokenizer = tokenizer_for(arguments.checkpoint, arguments.tokenizer)
    marks = COLOURED if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else PLAIN
    for text, judged in zip(texts, detect_all(model, tokenizer, texts), strict=True):
        found = stretches(judged, arguments.threshold)
        print(as_json(text, judged, found) if arguments.json else shown(text, judged, found, marks))


def read_lines() -> list[str]:
    """The lines of standard input that are not blank. Raises ConfigError where there are none."""
    if sys.stdin.isatty():
        raise ConfigError('there is no text; write one behind the checkpoint, "The capital of France is banana."')
    with open_text(STANDARD_INPUT) as file:
        lines = [line.rstrip("\n") for line in file if line.strip()]
    if not lines:
        raise ConfigError("standard input has no text; write one on each line, or behind the checkpoint")
    return lines


def shown(text: str, judged: Sequence[JudgedToken], found: Sequence[Found], marks: tuple[str, str]) -> str:
    """The text with what was found marked, and the probabilities below."""
    before, behind = marks
    marked, end = "", 0
    for stretch in found:
        marked += text[end : stretch.start] + before + text[stretch.start : stretch.end] + behind
        end = stretch.end
    lines = [marked + text[end:]]
    lines += [f"{stretch.probability:8.2%}  {text[stretch.start : stretch.end]}" for stretch in found]
    if not found:
        most = max(judged, key=lambda token: token.probability)
        what = text[most.start : most.end] or most.piece
        lines.append(f"{most.probability:8.2%}  {what}  (nothing found; this is the most suspicious)")
    return "\n".join(lines)


def as_json(text: str, judged: Sequence[JudgedToken], found: Sequence[Found]) -> str:
    """A line of JSON; places are counted in characters."""
    replaced = [stretch._asdict() | {"text": text[stretch.start : stretch.end]} for stretch in found]
    tokens = [token._asdict() for token in judged]
    return json.dumps({"text": text, "replaced": replaced, "tokens": tokens}, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
