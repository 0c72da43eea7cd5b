"""Losses of the tasks, and the distributions that their logits stand for.

Shape suffixes of this file:
    B rows   S sequence   C classes   I items (examples, or labelled tokens, or ends of spans)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.settings.architecture import IGNORED, HeadKind


def count_items(kind: HeadKind, labels: Tensor) -> int:
    """What the mean of the loss is over: labelled tokens, or examples. The host's labels spare a synchronisation."""
    place_I = labelled_places(kind, labels)
    return len(labels if place_I is None else place_I)


def labelled_places(kind: HeadKind, labels: Tensor) -> Tensor | None:
    """Where something is asked among all positions of the rows, one after the other [I], of token; None elsewhere.

    From the host's labels: a device would have to be waited for, since nobody else knows how many there are.
    """
    return (labels.flatten() != IGNORED).nonzero().squeeze(1) if kind == "token" else None


def task_loss(kind: HeadKind, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The loss summed over the items.

    `labels`: int64 [B] (classification, choice), float [B] (regression), float [B, C] of zeros and ones (multi_label),
    int64 [B, S] with −100 where nothing is asked (token), int64 [B, 2] first and last position (span).
    `class_weights` [C] weigh classes of classification, token and multi_label (there: the ones of each label).
    """
    if kind == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype), reduction="sum")
    if kind == "multi_label":
        per_label = F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), pos_weight=class_weights, reduction="none"
        )
        return per_label.mean(-1).sum()
    if kind == "span":
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten(), reduction="sum") / 2
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), class_weights, reduction="sum", ignore_index=IGNORED
    )


def hide_padding(kind: HeadKind, logits: Tensor, is_token_BS: Tensor) -> Tensor:
    """The logits with no chance left to padding, where they compete over positions (span)."""
    if kind != "span":
        return logits
    # Finite: −inf times a probability of 0 would not be a number.
    return logits.masked_fill(~is_token_BS.unsqueeze(-1), torch.finfo(logits.dtype).min)


def distribution_logits(kind: HeadKind, logits: Tensor, place_I: Tensor | None) -> Tensor:
    """The logits as rows [I, C] of independent categorical distributions; multi_label has one of two classes a label.

    `place_I` are `labelled_places`. Not for regression, whose outputs are no probabilities.
    """
    if kind == "token":
        return logits.flatten(0, 1)[place_I]
    if kind == "span":
        return logits.transpose(1, 2).flatten(0, 1)
    if kind == "multi_label":
        return torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1)
    return logits
