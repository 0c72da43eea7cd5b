"""A small model in a DeepSpeed engine of any supported layout, for the tests of checkpoints.

Sizes are odd on purpose, so that flat tensors need padding and parameters straddle the ranks' borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as distributed
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

VOCABULARY, HIDDEN, SEQUENCE, GLOBAL_BATCH, MICRO_BATCH = 37, 19, 7, 8, 2


class Layout(NamedTuple):
    """How the engine holds the model."""

    world_size: int
    stage: int
    precision: str = "fp32"
    """`fp32`, `bf16`, `bf16_fp32_gradients` (BF16_Optimizer under ZeRO-1) or `fp16`."""
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters below this size whole; 0 cuts every one."""
    sub_group_size: int = 1_000_000_000
    """ZeRO-3 steps this many elements at once."""

    @property
    def label(self) -> str:
        """Short, for test ids and folder names."""
        cut = "-cut" if self.persistence_threshold == 0 else ""
        return f"zero{self.stage}-ranks{self.world_size}-{self.precision}{cut}"


class TinyModel(nn.Module):
    """Embedding, two feed-forward blocks, LayerNorm, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(3 * HIDDEN, HIDDEN) for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.head.weight = self.word_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of predicting each token's successor modulo the vocabulary."""
        hidden = self.word_embeddings(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(nn.functional.gelu(up(self.norm(hidden))))
        logits = self.head(self.norm(hidden)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), (tokens.flatten() + 1) % VOCABULARY)


def build_engine(layout: Layout, *, seed: int = 1, model: nn.Module | None = None) -> deepspeed.DeepSpeedEngine:
    """A fresh engine, with weights from `seed`, two parameter groups (decay or not), AdamW and clipping."""
    if layout.precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True  # the CPU can, slowly; DeepSpeed asks for hardware support
    torch.manual_seed(seed)
    model = model or TinyModel()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=engine_config(layout)
    )
    return engine


def engine_config(layout: Layout) -> dict:
    """The DeepSpeed configuration of a layout; the global batch is the same in all of them."""
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH // layout.world_size,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": layout.stage},
        "bf16": {"enabled": layout.precision.startswith("bf16")},
        "fp16": {
            "enabled": layout.precision == "fp16",
            "initial_scale_power": 16,
            "hysteresis": 1,
            "loss_scale_window": 2,
        },
    }
    if layout.precision == "bf16_fp32_gradients":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if layout.stage == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": layout.persistence_threshold,
            "sub_group_size": layout.sub_group_size,
        }
    return config


def micro_batches(step: int) -> Iterator[Tensor]:
    """This rank's share of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE), generator=generator)
    share = batch.chunk(distributed.get_world_size())[distributed.get_rank()]
    yield from share.split(MICRO_BATCH)


def train(engine: deepspeed.DeepSpeedEngine, first: int, last: int) -> list[float]:
    """Steps `first` to `last` (inclusive) with a rate that falls; the global loss of each."""
    losses = []
    for step in range(first, last + 1):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 / step
        total = torch.zeros(())
        for tokens in micro_batches(step):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        distributed.all_reduce(total)
        losses.append(total.item() * MICRO_BATCH / GLOBAL_BATCH)
    return losses
