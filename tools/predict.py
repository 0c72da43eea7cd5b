"""What a fine-tuned model says of new texts: a line of JSON in, a line of JSON out.

CHECKPOINT is a fine-tuning run (its best weights), a checkpoint or a weights folder; of several, the logits are
averaged. Each line of the input is an object with `text` (and `text_pair`), or `context` and `options` (choice),
`words` (token), `context` and `question` (span); an `id` comes back with the prediction. Blank lines are passed over.

examples:
  python tools/predict.py runs/sst2 --input reviews.jsonl --output labels.jsonl
  torchrun --nproc_per_node 4 tools/predict.py runs/rte-1 runs/rte-2 --input pairs.jsonl --output labels.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import add_precision, build_parser, run_tool
from deberta_xl.base.errors import ConfigError, counted
from deberta_xl.base.launch import read_launch
from deberta_xl.base.output_file import check_output, is_stream, open_output, report_stream
from deberta_xl.base.strict import at_least
from deberta_xl.public.task_predict import Predictor
from deberta_xl.run.joining import join_ranks
from deberta_xl.tasks.length_batches import MICRO_BATCH_TOKENS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="fine-tuned models")
    parser.add_argument("--input", required=True, type=Path, help=".jsonl file")
    parser.add_argument(
        "--output", required=True, type=Path, help=".jsonl file to write; a pipe or a device is written to, too"
    )
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=MICRO_BATCH_TOKENS,
        help="most tokens in one forward, padding counted; fewer take less memory (default: %(default)s)",
    )  # fmt: skip
    add_precision(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Predict, and write the output in one piece."""
    at_least(1, micro_batch_tokens=arguments.micro_batch_tokens)
    launch = read_launch()
    if not is_stream(arguments.input):  # what cannot be read or written is noticed before the models are read
        arguments.input.open("rb").close()
    elif launch.world_size > 1:
        raise ConfigError(f"--input {arguments.input}: {launch.world_size} ranks cannot share a pipe; write a file")
    check_output(arguments.output, [arguments.input, *arguments.checkpoints])
    device, tokens = join_ranks(launch), arguments.micro_batch_tokens
    predictor = Predictor(arguments.checkpoints, launch, device, tokens, arguments.dtype)
    lines = predictor.predict_file(arguments.input)
    if launch.rank:
        for _ in lines:
            pass
        return
    count = 0
    with open_output(arguments.output) as file:
        for line in lines:
            file.write(line)
            count += 1
    print(f"{arguments.output}: {counted(count, 'prediction')}", file=report_stream(arguments.output))


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), outputs=lambda given: [given.output]))
