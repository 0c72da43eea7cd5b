"""Loss, perplexity and accuracy of a checkpoint on a held-out dataset: of masked tokens, or of each next token.

CHECKPOINT is a run folder (its newest whole checkpoint), a step or weights folder, or a folder in the original
release's or Hugging Face's layout. DATA is the prefix of a dataset made by tools/preprocess.py with the same tokenizer.
Order and masks of the rows are fixed, and those of every run's own evaluations, so that checkpoints and runs can be
compared; the numbers do not depend on the number of ranks.

--metric masked_lm predicts the masked tokens of each row. --metric perplexity predicts every token from those before it
in its row: exp(loss), the loss being the mean of -ln p over the predicted tokens, ends of documents included. The same
sum divided by the words and by the bytes of the text gives figures that can be compared between tokenizers.

examples:
  python tools/evaluate.py runs/first data/valid
  torchrun --nproc_per_node 2 tools/evaluate.py runs/first data/valid --max_samples 1000
  python tools/evaluate.py runs/causal data/valid --metric perplexity
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import add_precision, build_parser, run_tool
from deberta_xl.base.errors import ConfigError, TokenStoreError, counted
from deberta_xl.base.launch import read_launch
from deberta_xl.base.log import logger
from deberta_xl.base.strict import at_least
from deberta_xl.data.loader import HELD_OUT_SEED, PretrainingData
from deberta_xl.data.text_size import TextMeasure, TextSize
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.unigram import log_unigram, token_counts
from deberta_xl.objectives.autoregressive import next_token_rows
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.masked_evaluation import MaskedEvaluation, evaluate_masked_lm
from deberta_xl.objectives.rows import MaskedRows
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.text_batches import memory_advice
from deberta_xl.run.joining import join_ranks
from deberta_xl.settings.presets import load_run_config
from deberta_xl.settings.pretraining import DataSection, RunConfig
from deberta_xl.tasks.length_batches import MICRO_BATCH_TOKENS
from deberta_xl.weights.named_folder import tokenizer_for
from deberta_xl.weights.pair import split_part

METRICS = ("masked_lm", "perplexity")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a run, checkpoint or weights")
    parser.add_argument("data", metavar="DATA", help="prefix of the held-out dataset")
    parser.add_argument(
        "--metric", choices=METRICS, help="what is predicted (default: perplexity for a model that only writes)"
    )
    parser.add_argument(
        "--sequence_length", type=int, help="tokens in a row (default: as in training, where that is recorded)"
    )
    parser.add_argument("--max_samples", type=int, default=0, help="rows to use, from all over DATA (default: 0 = all)")
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=MICRO_BATCH_TOKENS,
        help="most tokens in one forward, one row at the least; fewer take less memory (default: %(default)s)",
    )  # fmt: skip
    add_precision(parser)
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="tokenizer, if the checkpoint has none")
    parser.add_argument(
        "--train", metavar="DATA", help="training dataset, for the loss of its unigram (default: the run's own)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def read_run(checkpoint: Path) -> RunConfig | None:
    """The configuration of a run folder; None for any other folder."""
    path = split_part(checkpoint)[0] / "config.toml"
    return load_run_config(path) if path.is_file() else None


def choose_length(
    asked: int | None, run_config: RunConfig | None, model: DebertaForMaskedLM, checkpoint: Path, rank: int
) -> int:
    """The sequence length asked for, that of the training, or the longest; on rank 0 a warning beyond the training's.

    Raises ConfigError for one that the model does not allow.
    """
    longest, trained = model.config.max_position_embeddings, model.learnt.sequence_length
    if trained is None and run_config is not None:  # of a run from before this was recorded with the weights
        trained = run_config.model.sequence_length
    length = (trained or longest) if asked is None else asked
    if not 8 <= length <= longest:
        raise ConfigError(f"--sequence_length {length} does not fit; the model allows 8 … {longest}")
    if trained is not None and length > trained and rank == 0:
        logger.warning(
            "%s was trained on rows of %d tokens: of the positions behind those, up to --sequence_length %d, it has "
            "learnt nothing, and the figures will be worse for that",
            checkpoint, trained, length,
        )  # fmt: skip
    return length


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
    at_least(1, micro_batch_tokens=arguments.micro_batch_tokens)
    launch = read_launch()
    store = TokenStore(arguments.data)
    model = DebertaForMaskedLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype))
    run_config = read_run(arguments.checkpoint)
    length = choose_length(arguments.sequence_length, run_config, model, arguments.checkpoint, launch.rank)
    tokenizer = tokenizer_for(arguments.checkpoint, arguments.tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        raise ConfigError(f"the tokenizer has {sizes}; give the one that the model was trained with")
    data = PretrainingData(store, tokenizer, run_config.data if run_config else DataSection(), length, HELD_OUT_SEED)
    is_masked = choose_metric(arguments, model, launch.rank) == "masked_lm"
    if is_masked:
        data.check_held_out(arguments.max_samples)
    needs_unigram = is_masked and launch.rank == 0
    unigram = read_unigram(arguments.train, run_config, tokenizer) if needs_unigram else None
    text = PredictedText(tokenizer)
    device = join_ranks(launch)
    ranks = Evaluator(model=model.to(device), device=device, rank=launch.rank, size=launch.world_size)
    with memory_advice(arguments.micro_batch_tokens):
        result = evaluate_masked_lm(
            ranks,
            data,
            MaskedRows.of if is_masked else next_token_rows,
            vocab_size=model.config.vocab_size,
            max_samples=arguments.max_samples,
            micro_batch_size=max(1, arguments.micro_batch_tokens // length),
            log_unigram=unigram,
            watch=text.watch,
        )
    size = TextSize(*ranks.add_up(torch.tensor(text.sizes, device=device).sum(0)).tolist())
    if launch.rank == 0:
        check_finite(arguments.checkpoint, result)
        print_head(arguments, length, result, "masked" if is_masked else "predicted")
        report(result) if is_masked else report_perplexity(result, size)


class PredictedText:
    """Measures the text of what is predicted in the batches that pass."""

    def __init__(self, tokenizer: Tokenizer):
        self.measure = TextMeasure(tokenizer)
        self.sizes: list[TextSize] = []
        """Of each batch."""

    def watch(self, batches: Iterable[MaskedRows]) -> Iterator[MaskedRows]:
        """The same batches."""
        for batch in batches:
            labelled = batch.labelled.without_padding()
            row_L = labelled.slot_L.numpy() // labelled.position_BM.shape[1]
            self.sizes.append(self.measure.size(labelled.label_L.numpy(), np.diff(row_L, prepend=-1) != 0))
            yield batch


def choose_metric(arguments: argparse.Namespace, model: DebertaForMaskedLM, rank: int) -> str:
    """The metric asked for, or that of what the model was trained for; on rank 0 a warning where the two differ."""
    objective = model.learnt.objective or "masked_lm"
    able = {"masked_lm": ["masked_lm"], "mixed": ["masked_lm", "perplexity"]}.get(objective, ["perplexity"])
    metric = arguments.metric or able[0]
    if metric not in able and rank == 0:
        task = "predict the next token" if metric == "perplexity" else "fill masks"
        logger.warning(
            "%s was never trained to %s (train.objective=%s): the figures say little of what it can do",
            arguments.checkpoint, task, objective,
        )  # fmt: skip
    return metric


def check_finite(checkpoint: Path, result: MaskedEvaluation) -> None:
    """Refuse to report a loss that is not a finite number. Raises ConfigError."""
    if not result.num_labels:
        raise ConfigError("nothing is predicted in these rows: give more text, or longer rows (--sequence_length)")
    if not math.isfinite(result.loss):
        raise ConfigError(
            f"the loss of {checkpoint} is {result.loss}: its training has diverged or its weights are damaged; take an "
            "earlier checkpoint"
        )


def print_head(arguments: argparse.Namespace, length: int, result: MaskedEvaluation, kind: str) -> None:
    """What was measured on what."""
    labels = counted(result.num_labels, f"{kind} token")
    print(f"{arguments.checkpoint} on {arguments.data}, rows of {length} tokens, {labels}")


def report(result: MaskedEvaluation) -> None:
    """Print the result for masked tokens."""
    unigram = f" (the training set's unigram: {result.unigram_entropy:.4f})" if result.unigram_entropy else ""
    print(f"  loss        {result.loss:.4f} nats{unigram}")
    print(f"  perplexity  {result.perplexity:.2f}")
    print(f"  accuracy    {result.accuracy:.2%}")
    names = ("loss", "perplexity", "accuracy", "unigram_entropy", "num_labels")
    print(json.dumps({name: getattr(result, name) for name in names}))


def report_perplexity(result: MaskedEvaluation, size: TextSize) -> None:
    """Print the result for next tokens: per token, and per word and byte of the text where all of it is known."""
    nats = result.loss * result.num_labels
    number_of = {"token": result.num_labels}
    if not size.unknown:
        number_of |= {"word": size.words, "byte": size.bytes}
    found = {unit: nats / number for unit, number in number_of.items() if number}
    perplexity = {unit: math.exp(min(loss, 700.0)) for unit, loss in found.items()}
    for unit, loss in found.items():
        print(f"  per {unit:6}  perplexity {perplexity[unit]:.2f}  loss {loss:.4f} nats  ({number_of[unit]:,} {unit}s)")
    if size.unknown:
        print(f"  per word and byte: not known, since the text of {counted(size.unknown, '[UNK]')} is not")
    print(f"  accuracy    {result.accuracy:.2%}")
    json_of = {"loss": result.loss, "perplexity": perplexity["token"], "accuracy": result.accuracy}
    json_of |= {f"{unit}_perplexity": perplexity.get(unit) for unit in ("word", "byte")}
    json_of |= {"bits_per_byte": found["byte"] / math.log(2) if "byte" in found else None}
    print(json.dumps(json_of | {"num_labels": result.num_labels, "num_words": size.words, "num_bytes": size.bytes}))


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments()))
