"""Masked-LM loss, perplexity and accuracy of a checkpoint on a held-out dataset.

CHECKPOINT is a run folder (its newest whole checkpoint), a step or weights folder, or a folder in the original
release's or Hugging Face's layout. DATA is the prefix of a dataset made by tools/preprocess.py with the same tokenizer.
Order and masks of the rows are fixed, and those of every run's own evaluations, so that checkpoints and runs can be
compared; the numbers do not depend on the number of ranks.

examples:
  python tools/evaluate.py runs/first data/valid
  torchrun --nproc_per_node 2 tools/evaluate.py runs/first data/valid --max_samples 1000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import add_precision, build_parser, run_tool
from deberta_xl.base.errors import ConfigError, TokenStoreError, counted
from deberta_xl.base.launch import read_launch
from deberta_xl.base.strict import at_least
from deberta_xl.data.loader import HELD_OUT_SEED, PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.unigram import log_unigram, token_counts
from deberta_xl.objectives.masked_evaluation import MaskedEvaluation, evaluate_masked_lm
from deberta_xl.objectives.objective import Evaluator
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.run.joining import join_ranks
from deberta_xl.settings.presets import load_run_config
from deberta_xl.settings.pretraining import DataSection, RunConfig
from deberta_xl.weights.named_folder import tokenizer_for


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, checkpoint or weights")
    parser.add_argument("data", metavar="DATA", help="prefix of the held-out dataset")
    parser.add_argument(
        "--sequence_length", type=int, help="tokens in a row (default: the run's own, or the longest possible)"
    )
    parser.add_argument("--max_samples", type=int, default=0, help="rows to use, from all over DATA (default: 0 = all)")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="rows in one forward (default: 8)")
    add_precision(parser)
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="tokenizer, if the checkpoint has none")
    parser.add_argument(
        "--train", metavar="DATA", help="training dataset, for the loss of its unigram (default: the run's own)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def read_run(checkpoint: Path) -> RunConfig | None:
    """The configuration of a run folder; None for any other folder."""
    path = checkpoint / "config.toml"
    return load_run_config(path) if path.is_file() else None


def choose_length(arguments: argparse.Namespace, run_config: RunConfig | None, longest: int) -> int:
    """The sequence length asked for, the run's own, or the longest."""
    if arguments.sequence_length is None:
        return run_config.model.sequence_length if run_config else longest
    if not 8 <= arguments.sequence_length <= longest:
        raise ConfigError(f"--sequence_length {arguments.sequence_length} does not fit; the model allows 8 … {longest}")
    return arguments.sequence_length


def read_unigram(asked: str | None, run_config: RunConfig | None, tokenizer: Tokenizer) -> np.ndarray | None:
    """The unigram of the training set asked for, or of the run's own where that is still there."""
    prefix = asked or (run_config.data.train if run_config else None)
    if prefix is None:
        return None
    try:
        store = TokenStore(prefix)
        store.check_tokenizer(tokenizer)
    except TokenStoreError:
        if asked:
            raise
        return None
    return log_unigram(token_counts(store, tokenizer.vocab_size), tokenizer.special)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print, as text and as one line of JSON."""
    import torch

    at_least(0, max_samples=arguments.max_samples)
    at_least(1, micro_batch_size=arguments.micro_batch_size)
    launch = read_launch()
    store = TokenStore(arguments.data)
    model = DebertaForMaskedLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype))
    run_config = read_run(arguments.checkpoint)
    length = choose_length(arguments, run_config, model.config.max_position_embeddings)
    tokenizer = tokenizer_for(arguments.checkpoint, arguments.tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        raise ConfigError(f"the tokenizer has {sizes}; give the one that the model was trained with")
    data = PretrainingData(store, tokenizer, run_config.data if run_config else DataSection(), length, HELD_OUT_SEED)
    data.check_held_out(arguments.max_samples)
    unigram = read_unigram(arguments.train, run_config, tokenizer) if launch.rank == 0 else None
    device = join_ranks(launch)
    result = evaluate_masked_lm(
        Evaluator(model=model.to(device), device=device, rank=launch.rank, size=launch.world_size),
        data,
        vocab_size=model.config.vocab_size,
        max_samples=arguments.max_samples,
        micro_batch_size=arguments.micro_batch_size,
        log_unigram=unigram,
    )
    if launch.rank == 0:
        check_finite(arguments.checkpoint, result)
        report(arguments, length, result)


def check_finite(checkpoint: Path, result: MaskedEvaluation) -> None:
    """Refuse to report a loss that is not a finite number."""
    if not math.isfinite(result.loss):
        raise ConfigError(
            f"the loss of {checkpoint} is {result.loss}: its training has diverged or its weights are damaged; take an "
            "earlier checkpoint"
        )


def report(arguments: argparse.Namespace, length: int, result: MaskedEvaluation) -> None:
    """Print the result."""
    labels = counted(result.num_labels, "masked token")
    print(f"{arguments.checkpoint} on {arguments.data}, rows of {length} tokens, {labels}")
    unigram = f" (the training set's unigram: {result.unigram_entropy:.4f})" if result.unigram_entropy else ""
    print(f"  loss        {result.loss:.4f} nats{unigram}")
    print(f"  perplexity  {result.perplexity:.2f}")
    print(f"  accuracy    {result.accuracy:.2%}")
    names = ("loss", "perplexity", "accuracy", "unigram_entropy", "num_labels")
    print(json.dumps({name: getattr(result, name) for name in names}))


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
