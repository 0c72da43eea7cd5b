"""Text that goes on where prompts end, by a model that was trained to predict the next token.

CHECKPOINT is a run folder (its newest whole checkpoint), a step or weights folder of train.objective=causal, prefix or
mixed. Prompts are arguments, lines of a file (or of a .jsonl with `prompt` or `text`), or lines of standard input.
Without --temperature, --top_k and --top_p each token is the most probable one; with any of them tokens are drawn. The
texts do not depend on the number of ranks, nor, but for rounding, on --batch_size.

examples:
  python tools/generate.py runs/story "Once upon a time"
  python tools/generate.py runs/story "Once upon a time" --temperature 0.8 --top_p 0.95 --seed 3
  torchrun --nproc_per_node 4 tools/generate.py runs/story --prompts prompts.jsonl --json > texts.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import add_precision, build_parser, complain, run_tool
from deberta_xl.base.errors import ConfigError, counted
from deberta_xl.base.launch import Launch, read_launch
from deberta_xl.base.output_file import is_stream
from deberta_xl.base.progress import tracked
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import build_groups
from deberta_xl.parallel.plan import divide
from deberta_xl.public.generation import Ranks, Stop, Writing, Written, generate
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.prompts import Prompt, Speller, read_prompt
from deberta_xl.public.room import Room
from deberta_xl.public.sampling import Sampling
from deberta_xl.run.joining import join_ranks
from deberta_xl.tasks.records import read_jsonl
from deberta_xl.tasks.text_files import open_text
from deberta_xl.weights.named_folder import tokenizer_for
from deberta_xl.weights.native_config import Form

STANDARD_INPUT = Path("/dev/stdin")


class Given(NamedTuple):
    """A prompt as its user names it."""

    id: object
    """Of a .jsonl file's `id`, otherwise its number from 0 on."""
    text: str


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, checkpoint or weights")
    parser.add_argument("texts", metavar="PROMPT", nargs="*", help="text to go on from (default: each line of stdin)")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="prompts, one per line, or .jsonl")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest continuation (default: 64)")
    parser.add_argument(
        "--max_length", type=int, help="longest text, prompt included (default: as long as a row in training)"
    )
    parser.add_argument("--temperature", type=float, help="draw tokens; below 1 the probable ones more often (1)")
    parser.add_argument("--top_k", type=int, help="draw among the so many most probable tokens")
    parser.add_argument("--top_p", type=float, help="draw among the fewest tokens of this probability together")
    parser.add_argument("--seed", type=int, help="another one draws other texts (default: 0)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts that are continued together (default: 8)")
    parser.add_argument(
        "--tensor_parallel_size", type=int, default=1, help="ranks that share a model too large for one (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    add_precision(parser)
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="tokenizer, if the checkpoint has none")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def read_sampling(arguments: argparse.Namespace) -> Sampling | None:
    """How tokens are drawn, where any option says that they are. Raises ConfigError for a seed that draws nothing."""
    options = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        return Sampling(**given, seed=arguments.seed or 0)
    if arguments.seed is not None:
        raise ConfigError(
            f"--seed {arguments.seed} draws nothing: without --temperature, --top_k and --top_p each token is the most "
            "probable one; add one of them, for example --temperature 1.0"
        )
    return None


def read_prompts(arguments: argparse.Namespace, launch: Launch) -> list[Given]:
    """The prompts, from the one place where they are. Raises ConfigError for none, or several places."""
    if arguments.texts:
        if arguments.prompts is not None:
            raise ConfigError(f"there are prompts on the command line and in --prompts {arguments.prompts}; give one")
        return [Given(number, text) for number, text in enumerate(arguments.texts)]
    path = arguments.prompts or STANDARD_INPUT
    if arguments.prompts is None and sys.stdin.isatty():
        raise ConfigError('there is no prompt; write one behind the checkpoint, "Once upon a time", or --prompts FILE')
    if launch.world_size > 1 and is_stream(path):
        raise ConfigError(
            f"{path}: {launch.world_size} ranks cannot share a pipe; write a file, and give it as --prompts"
        )
    found = list(prompts_of(path))
    if not found:
        raise ConfigError(f"{path} has no prompts; write one on each line")
    return found


def prompts_of(path: Path) -> Iterator[Given]:
    """The prompts of a file; blank lines are passed over. Raises ConfigError for a record without any."""
    if path.suffix != ".jsonl":
        with open_text(path) as file:
            lines = (line.rstrip("\n") for line in file)
            yield from (Given(number, line) for number, line in enumerate(filter(str.strip, lines)))
        return
    for number, record in enumerate(read_jsonl(path)):
        text = record.fields.get("prompt", record.fields.get("text"))
        if not isinstance(text, str):
            raise ConfigError(f"{record.place}: there is no text under `prompt` or `text`")
        yield Given(record.fields.get("id", number), text)


def run(arguments: argparse.Namespace) -> None:
    """Read prompts and model, and write on."""
    import torch

    launch = read_launch()
    grid = Grid.of(launch.rank, launch.world_size, arguments.tensor_parallel_size)
    lengths = {"max_new_tokens": arguments.max_new_tokens, "max_length": arguments.max_length}
    writing = Writing(**lengths, sampling=read_sampling(arguments), batch_size=arguments.batch_size)
    given = read_prompts(arguments, launch)
    tokenizer = tokenizer_for(arguments.checkpoint, arguments.tokenizer)
    model = DebertaForMaskedLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype))
    room = Room.of(model.config, model.learnt, writing.max_length)
    read = [read_prompt(prompt.text, number, tokenizer, room) for number, prompt in enumerate(given)]
    if launch.rank == 0:
        warn(arguments.checkpoint, model.learnt.writes_as, read, tokenizer)
    ranks = place(model, launch, grid)
    if len(given) == 1 and launch.world_size == 1 and sys.stdout.isatty() and not arguments.json:
        stopped = [stream(model, tokenizer, read[0], writing)]
    else:
        stopped = []
        found = generate(model, tokenizer, [prompt.text for prompt in given], writing, ranks=ranks)
        for prompt, written in zip(given, tracked(found, "generating", len(given), "prompts"), strict=True):
            stopped.append(written.stopped)
            if launch.rank == 0:
                print(line_of(prompt, written) if arguments.json else written.text, flush=True)
    if launch.rank == 0 and room.limit != "max_length" and (number := stopped.count(room.limit)):
        what = f"{number} of {counted(len(stopped), 'text')}"
        complain(f"{what} filled {room.name}, and stopped there{room.way_out}")


def place(model: DebertaForMaskedLM, launch: Launch, grid: Grid) -> Ranks:
    """Bring the model, or this rank's slice of it, to its device. Collective."""
    device = join_ranks(launch)
    groups = build_groups(grid)
    divide(model, groups)
    model.to(device)
    ranks = Ranks(grid.data_parallel_rank, grid.data_parallel_size, groups.data_group)
    if grid.tensor_parallel_size == 1:
        return ranks
    from deberta_xl.parallel.layers import join_vocabulary  # imports megatron-core, which costs seconds

    return ranks._replace(join_logits=partial(join_vocabulary, vocab_size=model.config.vocab_size, groups=groups))


def warn(checkpoint: Path, form: Form | None, prompts: list[Prompt], tokenizer: Tokenizer) -> None:
    """Say what will not go well, and go on."""
    if form is None:
        complain(
            f"warning: {checkpoint} has not been trained to write on (its config.json names no such objective): do not "
            "expect sense; train with train.objective=causal, prefix or mixed, which may start from it "
            "(train.init)"
        )
    if unknown := [prompt for prompt in prompts if tokenizer.unk_id in prompt.token_ids]:
        first = unknown[0]
        ids, places = tokenizer.encode_with_places(first.text)
        there = {
            first.text[slice(*place)] for token, place in zip(ids, places, strict=True) if token == Tokenizer.unk_id
        }
        complain(
            f"warning: {counted(len(unknown), 'prompt')} of {len(prompts)} with characters that the tokenizer does not "
            f"know, and the model reads as [UNK]; in prompt {first.number + 1}: {' '.join(sorted(there))}"
        )


def stream(model: DebertaForMaskedLM, tokenizer: Tokenizer, prompt: Prompt, writing: Writing) -> Stop:
    """Show a text while it is written; why it stops."""
    speller = Speller(tokenizer)
    print(prompt.text, end="", flush=True)

    def show(row: int, token_id: int) -> None:
        print(speller.spell(token_id), end="", flush=True)

    (written,) = generate(model, tokenizer, [prompt.text], writing, hear=show)
    print(speller.end())
    return written.stopped


def line_of(prompt: Given, written: Written) -> str:
    """A line of JSON."""
    fields = {"id": prompt.id, "prompt": prompt.text, "continuation": written.continuation, "text": written.text}
    return json.dumps(fields | {"tokens": len(written.token_ids), "stopped": written.stopped}, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
