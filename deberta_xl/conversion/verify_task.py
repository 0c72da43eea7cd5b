"""Whether an exported model for a task computes what its source does: the logits of one text through both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.verify import Difference, batch, compare_tokenizers
from deberta_xl.model.task_model import TaskModel
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.weights.foreign_heads import read_foreign_task
from deberta_xl.weights.head_facts import read_head
from deberta_xl.weights.native import read_weights
from deberta_xl.weights.pretrained_folder import Pretrained


def verify_task(source: Pretrained, written: Path, tolerance: float, show: Callable[[str], None]) -> None:
    """Compare labels, tokenizers and logits, and show how far they are apart; one model in memory at a time.

    Raises CheckpointError when the logits differ by more than `tolerance`, as a share of the largest of them.
    """
    before = read_head(source.folder)
    config, facts, weights = read_foreign_task(written)
    if (facts.head.kind, facts.labels) != (before.head.kind, before.labels):
        raise CheckpointError(
            f"the written head is a {facts.head.kind} of {facts.labels}, its source a {before.head.kind} of "
            f"{before.labels}"
        )
    there = Pretrained(folder=written, kind="huggingface", config=config, tensors={}, tokenizer=written)
    compare_tokenizers(source, there, show)
    input_ids_BS, _ = batch(source)
    theirs = logits_of(config, facts.head, weights, input_ids_BS)
    del weights
    ours = logits_of(source.config, before.head, read_weights(source.folder), input_ids_BS)
    found = Difference("logits", (ours - theirs).abs().max().item(), ours.abs().max().item())
    if not found.share <= tolerance:
        raise CheckpointError(
            f"the written model differs from its source: the logits by {found.largest:.2e}, {found.share:.1e} of the "
            f"largest; allowed: {tolerance:.0e}. Nothing was kept; a --tolerance above that accepts it"
        )
    show(f"verified: the logits differ by {found.share:.1e} of the largest; allowed {tolerance:.0e}")


@torch.inference_mode()
def logits_of(config: DebertaConfig, head: HeadConfig, weights: Mapping[str, Tensor], input_ids_BS: Tensor) -> Tensor:
    """What a model for a task answers to a batch, in float32."""
    with torch.device("meta"):
        model = TaskModel(config, head).eval()
    model.load_state_dict({name: weights[name].float() for name, _ in model.named_parameters()}, assign=True)
    return model(input_ids_BS)
