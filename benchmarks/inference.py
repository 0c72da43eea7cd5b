"""Classifying many texts: ours as tools/predict.py reads them, transformers' eager model in its usual padded batches.

The same weights: 6 layers of 384, 6 heads, a vocabulary of 8,192, reach of 512; float32 on a CPU, bfloat16 on a GPU.
Lengths are invented (log-normal, always the same ones), or those of a file with a text on each line, words and
punctuation marks counted as tokens. Transformers takes 16 texts at a time, as they come or sorted by length; ours at
most 4,096 tokens, sorted, with each kernel. All have to agree on the first texts before they are timed.

examples:
  python benchmarks/inference.py
  python benchmarks/inference.py --texts 64 --lengths glue/SST-2/dev.tsv --json inference.json
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser
from benchmarks.interleaved import Run, Way, disagreements, explain, measure, record, write_json
from deberta_xl.model.part_costs import KERNELS
from deberta_xl.model.task_model import TaskModel
from deberta_xl.settings.presets import load_run_config
from deberta_xl.tasks.length_batches import MICRO_BATCH_TOKENS, length_batches
from deberta_xl.weights.foreign_config import to_huggingface_config
from deberta_xl.weights.foreign_heads import read_foreign_task
from deberta_xl.weights.native import fill_model

REACH, VOCABULARY, CHECKED_TEXTS, USUAL_BATCH = 512, 8192, 8, 16
SIZES = [
    f"model.vocab_size={VOCABULARY}", "model.hidden_size=384", "model.intermediate_size=1536", "model.num_layers=6",
    "model.num_heads=6", f"model.max_position_embeddings={REACH}", f"model.max_relative_positions={REACH}",
]  # fmt: skip
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of the logits' norm."""


class Models(NamedTuple):
    """One set of weights."""

    theirs: DebertaV2ForSequenceClassification
    ours: TaskModel


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--texts", type=int, default=128, help="how many (default: %(default)s)")
    parser.add_argument("--median", type=float, default=60.0, help="of invented lengths (default: %(default)s)")
    parser.add_argument("--lengths", type=Path, help="file with a text on each line, whose lengths are taken")
    parser.add_argument("--turns", type=int, default=3, help="times that each way is measured (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.set_defaults(peak_tflops=0.0, model="small")
    return parser.parse_args(arguments)


def lengths_of(options: argparse.Namespace) -> np.ndarray:
    """Tokens of each text."""
    random = np.random.default_rng(1)
    if options.lengths is None:
        lengths = random.lognormal(np.log(options.median), 0.7, options.texts)
    else:
        lines = options.lengths.read_text(encoding="utf-8", errors="replace").splitlines()
        counts = np.array([2 + len(re.findall(r"\w+|[^\w\s]", line)) for line in lines if line.strip()])
        lengths = random.permutation(counts)[: options.texts]
    return lengths.round().clip(3, REACH).astype(int)


def build_models(device: torch.device, dtype: torch.dtype) -> Models:
    """Fresh weights of transformers, and the same ones in what `DebertaForTask` is."""
    config = load_run_config("base", SIZES).model.architecture(2)
    torch.manual_seed(1)
    theirs = DebertaV2ForSequenceClassification(DebertaV2Config(**to_huggingface_config(config), num_labels=2))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config, facts, weights = read_foreign_task(Path(folder))
        with torch.device("meta"):
            ours = TaskModel(config, facts.head)
        fill_model(ours, weights, Path(folder), dtype)
    return Models(theirs.to(device, dtype).eval(), ours.to(device).eval())


def logits(
    model: nn.Module, texts: list[list[int]], batches: Sequence[np.ndarray], device: torch.device
) -> tuple[Tensor, ...]:
    """Of all texts, in their order; batches are padded to their longest."""
    found = torch.empty(len(texts), 2)
    for numbers in batches:
        ids_of = [torch.tensor(texts[number]) for number in numbers]
        input_ids = nn.utils.rnn.pad_sequence(ids_of, batch_first=True).to(device)
        output = model(input_ids, (input_ids > 0).long())
        found[numbers] = (output if isinstance(output, Tensor) else output.logits).float().cpu()
    return (found,)


def our_logits(
    kernel: str, model: TaskModel, texts: list[list[int]], batches: Sequence[np.ndarray], device: torch.device
) -> tuple[Tensor, ...]:
    """The same with a kernel."""
    model.use_kernel(kernel)
    return logits(model, texts, batches, device)


def usual_batches(order: np.ndarray) -> list[np.ndarray]:
    """Equally many texts in each."""
    return np.split(order, range(USUAL_BATCH, len(order), USUAL_BATCH))


def ways_of(models: Models, texts: list[list[int]], device: torch.device) -> list[Way]:
    """Transformers first."""
    lengths = np.array(list(map(len, texts)))
    as_they_come, by_length = usual_batches(np.arange(len(texts))), usual_batches(np.argsort(lengths))
    runs: dict[str, Run] = {
        "transformers": partial(logits, models.theirs, texts, as_they_come, device),
        "transformers, sorted": partial(logits, models.theirs, texts, by_length, device),
    }
    batches = length_batches(lengths, MICRO_BATCH_TOKENS)
    runs |= {f"ours, {name}": partial(our_logits, name, models.ours, texts, batches, device) for name in KERNELS}
    return [Way(name, lambda run=run: run) for name, run in runs.items()]


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    """Check, measure and print; the exit status."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    models, random = build_models(device, dtype), np.random.default_rng(2)
    texts = [[1, *random.integers(4, VOCABULARY, length - 2).tolist(), 2] for length in lengths_of(options)]
    tokens = sum(map(len, texts))
    case = f"{len(texts)} texts, {tokens:,} tokens, longest {max(map(len, texts))}"
    checked = ways_of(models, texts[:CHECKED_TEXTS], device)
    wrong = disagreements(checked, checked[0].make()(), TOLERANCES[dtype])
    measured = measure([way for way in ways_of(models, texts, device) if way.name not in wrong], options, device)
    measured.failures.update(wrong)
    print(f"{case}\n{'way':22} {'texts/s':>9} {'tokens/s':>10} {'speed':>7} {'peak MiB':>9}")
    content = record(case, measured)
    for name, figure in measured.figures.items():
        rates = {"texts_per_second": len(texts) * 1e3 / figure.milliseconds,
                 "tokens_per_second": tokens * 1e3 / figure.milliseconds}  # fmt: skip
        content["ways"][name] |= rates
        texts_rate, tokens_rate = rates.values()
        print(f"{name:22} {texts_rate:9.1f} {tokens_rate:10,.0f} {figure.speed:7.2f} {figure.peak_mib:9.1f}")
    for name, error in measured.failures.items():
        print(f"{name:22} not measured: {explain(error)}")
    if options.json:
        write_json(options, device, [content])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run(parse_arguments()))
