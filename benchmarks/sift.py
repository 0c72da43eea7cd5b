"""What SiFT costs: time of a step on this machine, and the memory of the 1.5B preset by its shapes.

python benchmarks/sift.py
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser
from benchmarks.recorder import counted_bytes
from deberta_xl.model.task_model import TaskModel
from deberta_xl.objectives.micro_batch import on_device
from deberta_xl.objectives.sift import Sift
from deberta_xl.objectives.task_batches import TaskLoss, TaskMicroBatch
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.settings.finetuning import SiftSection
from deberta_xl.settings.presets import load_run_config

GIB = 2**30
HEAD = HeadConfig(kind="classification", num_labels=3)


def batch_of(rows: int, length: int, vocab_size: int) -> TaskMicroBatch:
    """A batch without padding."""
    ids = torch.randint(4, min(vocab_size, 1000), (rows, length))
    ones = torch.ones_like(ids)
    return TaskMicroBatch(
        ids, ones, torch.zeros_like(ids), torch.zeros(rows, dtype=torch.int64), 1, (rows, length * rows)
    )


def losses(model: TaskModel, batch: TaskMicroBatch, sift: Sift | None) -> Tensor:
    """The total loss of one micro-batch."""
    objective = TaskLoss(
        model.head.kind, model.config.hidden_size, batch, share=float(batch.counts[0]), sift=sift, sift_weight=5.0,
        class_weights=None, key=None,
    )  # fmt: skip
    return model(batch.input_ids_BS, batch.segments_BS, objective=objective).total


def seconds(model: TaskModel, batch: TaskMicroBatch, sift: Sift | None, repeats: int = 5) -> float:
    """The fastest of some forwards and backwards."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        losses(model, batch, sift).backward()
        best = min(best, time.perf_counter() - start)
        model.zero_grad()
    return best


def activation_gib(config: DebertaConfig, rows: int, length: int, sift: Sift | None, *, recompute: bool) -> float:
    """Peak of what autograd keeps for one micro-batch in bf16, by shapes alone."""
    with torch.device("meta"):
        model = TaskModel(config, HEAD).to(torch.bfloat16)
        batch = on_device(batch_of(rows, length, config.vocab_size), torch.device("meta"))
        if recompute:
            model.checkpoint_activations()
        with counted_bytes(model) as counter:
            losses(model, batch, sift).backward()
    return counter.peak / GIB


def main() -> None:
    """Print both, memory first."""
    config = load_run_config("xxlarge").model.architecture(128_100)
    measure = partial(activation_gib, config, 8, 256)
    for name, sift in (("plain", None), ("SiFT", Sift(SiftSection(weight=5.0), "classification"))):
        kept, recomputed = (measure(sift, recompute=flag) for flag in (False, True))
        print(f"xxlarge, {name}: activations {kept:.1f} GiB, with activation checkpointing {recomputed:.1f} GiB")
    print_times()


def print_times() -> None:
    """A small model's steps on this machine."""
    small = DebertaConfig(
        vocab_size=8000, hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, position_buckets=32
    )
    model, batch = TaskModel(small, HEAD), batch_of(8, 128, 8000)
    plain = seconds(model, batch, None)
    for steps in (1, 2):
        ratio = seconds(model, batch, Sift(SiftSection(weight=5.0, steps=steps), "classification")) / plain
        print(f"SiFT with {steps} steps: {ratio:.2f} times the time of a plain forward and backward ({plain:.3f} s)")


if __name__ == "__main__":
    build_parser(__doc__).parse_args()
    main()
