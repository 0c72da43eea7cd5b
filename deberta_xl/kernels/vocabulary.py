"""What a vocabulary says of states: the cross-entropy, best guess and drawn token of each, without all their logits.

The logits would be the largest tensors of a step, in float32 three times over. Here they exist for one block of columns
after the other. The forward pass keeps nothing of them but the logarithm of each position's sum of exponentials, and
the backward pass computes them again: a fourth product beside the three of a head that keeps them.

Blocks are of columns, not of positions. So each row of the table's gradient is a single product, which is rounded once
in whatever the weights are, and only the states' gradient is summed over blocks, in float32.

A block's columns are a multiple of ALIGNMENT: those of the last one are filled up with zeros, whose logits nobody
reads. The table itself has no more rows than the vocabulary has pieces.

Shape suffixes of this file:
    L positions   E width of the table   V columns of this rank   C columns of a block   K parts of a vocabulary
    W winners: the best guess, and where tokens are drawn the drawn one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deberta_xl.kernels.sampling import draw_tokens
from deberta_xl.kernels.vocabulary_blocks import ALIGNMENT, blocks_of


class Drawing(NamedTuple):
    """How a token is drawn at each position; as `draw_tokens` has it."""

    position_L: Tensor
    seed_L: Tensor
    temperature: float


class Verdict(NamedTuple):
    """What some columns say of each position."""

    log_sum_L: Tensor
    """Logarithm of the sum of the logits' exponentials."""
    label_logit_L: Tensor
    """Logit of the label; 0 where other columns have that."""
    value_WL: Tensor
    """Of the winners: the largest logit, and the largest sum of logit and noise."""
    token_WL: Tensor
    """Their ids."""


class Judged(NamedTuple):
    """What the whole vocabulary says."""

    loss: Tensor
    """Cross-entropy, summed over the positions that have a label."""
    guess_L: Tensor
    """The id of the largest logit; the lowest id of equal ones."""
    drawn_L: Tensor | None
    """A token drawn at each position, where that was asked for."""


def alone(verdict: Verdict) -> Verdict:
    """Of columns beside which there are no others."""
    return verdict


@dataclass(frozen=True)
class Vocabulary:
    """Which columns of a vocabulary are here, and how what they say becomes what all say."""

    size: int
    """Of the whole vocabulary."""
    columns: range
    """Those of the table's first rows; further rows are padding."""
    join: Callable[[Verdict], Verdict] = alone
    """From these columns' verdict to all columns'."""


def judge(
    states_LE: Tensor, table_VE: Tensor, bias_V: Tensor, label_L: Tensor, here: Vocabulary, draw: Drawing | None = None
) -> Judged:
    """Loss, guesses and, where asked for, drawn tokens of logits = states · tableᵀ + bias.

    Positions whose label is not above 0 have no part in the loss. The gradient of the states is that of the columns
    here.
    """
    loss, token_WL = _Judge.apply(states_LE, table_VE, bias_V, label_L, here, draw)
    return Judged(loss, token_WL[0], None if draw is None else token_WL[1])


class _Judge(torch.autograd.Function):
    """Loss and winners."""

    @staticmethod
    def forward(
        ctx: Any,
        states_LE: Tensor,
        table_VE: Tensor,
        bias_V: Tensor,
        label_L: Tensor,
        here: Vocabulary,
        draw: Drawing | None,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            verdict_of(
                logits_of(states_LE, table_VE, bias_V, block)[:, : len(block)], here.columns[block.start],
                label_L, here.size, draw,
            )
            for block in blocks_of(len(label_L), len(here.columns))
        ]  # fmt: skip
        found = here.join(merged(parts or [no_verdict(states_LE, label_L, draw)]))
        ctx.save_for_backward(states_LE, table_VE, bias_V, label_L, found.log_sum_L)
        ctx.columns = here.columns
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found.token_WL)
        return torch.where(label_L > 0, found.log_sum_L - found.label_logit_L, 0).sum(), found.token_WL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        states_LE, table_VE, bias_V, label_L, log_sum_L = ctx.saved_tensors
        weight_L1 = torch.where(label_L > 0, gradient.to(log_sum_L.dtype), 0).unsqueeze(-1)
        of_states_LE = torch.zeros_like(states_LE, dtype=log_sum_L.dtype)
        of_table_VE, of_bias_V = torch.empty_like(table_VE), torch.empty_like(bias_V)
        for block in blocks_of(len(label_L), len(ctx.columns)):
            here = slice(block.start, block.stop)
            logits_LC = logits_of(states_LE, table_VE, bias_V, block)
            label_of_block_L = label_L - ctx.columns[block.start]
            into_gradient(logits_LC, len(block), label_of_block_L, log_sum_L, weight_L1)
            of_states_LE += logits_LC @ padded(table_VE[here])
            multiply_into(of_table_VE[here], logits_LC.T, states_LE)
            of_bias_V[here] = logits_LC[:, : len(block)].sum(0, dtype=log_sum_L.dtype)
        of_table_VE[len(ctx.columns) :] = 0
        of_bias_V[len(ctx.columns) :] = 0
        return of_states_LE.to(states_LE.dtype), of_table_VE, of_bias_V, None, None, None


def logits_of(states_LE: Tensor, table_VE: Tensor, bias_V: Tensor, block: range) -> Tensor:
    """The logits of a block's columns and of its padding, [L, C], in the weights' type."""
    here = slice(block.start, block.stop)
    return F.linear(states_LE, padded(table_VE[here]), padded(bias_V[here]))


def padded(rows: Tensor) -> Tensor:
    """Rows of the table or the bias, filled up to a multiple of ALIGNMENT with zeros."""
    missing = -len(rows) % ALIGNMENT
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, missing)) if missing else rows


def verdict_of(logits_LC: Tensor, first: int, label_L: Tensor, vocab_size: int, draw: Drawing | None) -> Verdict:
    """What columns from `first` on say; their logits are spent."""
    value_L, index_L = logits_LC.max(-1)
    winners = [(value_L.to(wide(logits_LC)), index_L + first)]
    if draw is not None:
        winners.append(draw_tokens(logits_LC, *draw, first_column=first, num_columns=vocab_size))
    place_L1, has_L1 = place_of(label_L - first, logits_LC.shape[1])
    label_logit_L1 = torch.where(has_L1, logits_LC.gather(1, place_L1), 0).to(wide(logits_LC))
    largest_L = winners[0][0]
    log_sum_L = exponentials(logits_LC, largest_L).sum(-1).log_().add_(largest_L)
    return Verdict(log_sum_L, label_logit_L1.squeeze(1), *map(torch.stack, zip(*winners, strict=True)))


def no_verdict(states_LE: Tensor, label_L: Tensor, draw: Drawing | None) -> Verdict:
    """That of no columns at all: of a rank that has nothing but padding."""
    nothing_L = torch.full_like(label_L, float("-inf"), dtype=wide(states_LE))
    num_winners = 1 if draw is None else 2
    return Verdict(
        nothing_L,
        torch.zeros_like(nothing_L),
        nothing_L.expand(num_winners, -1),
        torch.zeros_like(label_L).expand(num_winners, -1),
    )


def merged(parts: Sequence[Verdict]) -> Verdict:
    """The verdict of several parts of a vocabulary, in the order of their columns."""
    if len(parts) == 1:
        return parts[0]
    log_sum_KL, label_logit_KL, value_KWL, token_KWL = map(torch.stack, zip(*parts, strict=True))
    value_1WL, best_1WL = value_KWL.max(0, keepdim=True)
    token_WL = token_KWL.gather(0, best_1WL).squeeze(0)
    return Verdict(log_sum_KL.logsumexp(0), label_logit_KL.sum(0), value_1WL.squeeze(0), token_WL)


def into_gradient(logits_LC: Tensor, num_columns: int, label_L: Tensor, log_sum_L: Tensor, weight_L1: Tensor) -> None:
    """weight · (softmax − [is the label]) in the place of logits; 0 in that of padding. Labels count from the block."""
    inside_LC = logits_LC[:, :num_columns]
    share_LC = exponentials(inside_LC, log_sum_L)
    place_L1, has_L1 = place_of(label_L, num_columns)
    share_LC.scatter_(1, place_L1, share_LC.gather(1, place_L1) - has_L1.to(share_LC.dtype))
    torch.mul(share_LC, weight_L1, out=inside_LC)  # rounded to the weights' type here
    logits_LC[:, num_columns:] = 0


def place_of(label_L: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """A column for each label, [L, 1], its own where it is among these, and whether it is."""
    place_L1 = label_L.clamp(0, num_columns - 1).unsqueeze(-1)
    return place_L1, place_L1 == label_L.unsqueeze(-1)


def exponentials(logits_LC: Tensor, shift_L: Tensor) -> Tensor:
    """exp(logits − shift) in the type of the shift; in the logits' place, where they have it."""
    shift_L1 = shift_L.unsqueeze(-1)
    shifted_LC = logits_LC.sub_(shift_L1) if logits_LC.dtype == shift_L.dtype else logits_LC - shift_L1
    return shifted_LC.exp_()


def multiply_into(room_CE: Tensor, left_CL: Tensor, right_LE: Tensor) -> None:
    """The rows of a product, without those that are padding."""
    if len(room_CE) == len(left_CL):
        torch.mm(left_CL, right_LE, out=room_CE)
    else:
        room_CE.copy_((left_CL @ right_LE)[: len(room_CE)])


def wide(logits: Tensor) -> torch.dtype:
    """The type of sums: at least float32."""
    return torch.promote_types(logits.dtype, torch.float32)
