"""Replaced token detection on held-out rows: means, the area under the ROC curve, and examples in their text.

Shape suffixes of this file:
    B batch   S sequence   K bins
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.replaced_tokens import Proposal
from deberta_xl.objectives.evaluation import Evaluation, Evaluator, Sums
from deberta_xl.objectives.masked_examples import text_of
from deberta_xl.objectives.objective import Reports, Tally
from deberta_xl.objectives.rows import MaskedRows
from deberta_xl.run.figure_text import plain

BINS = 4096
"""Of logits between −LIMIT and LIMIT: logits of one bin count as equal in the area under the curve."""
LIMIT = 16.0
EXAMPLES, EXAMPLE_TOKENS = 12, 64
"""Rows that are shown, and how much of each."""


class Example(NamedTuple):
    """The beginning of a row: token ids without padding."""

    original: list[int]
    corrupted: list[int]
    is_replaced: list[bool]
    is_flagged: list[bool]


class DetectionEvaluation:
    """Sums over held-out batches, on the device until the end, when it is waited for once."""

    def __init__(self, run: Evaluator, reports: Reports, counts: Sequence[str]):
        self.run, self.reports, self.count_names = run, reports, counts
        self.sums = torch.zeros(len(reports), dtype=torch.float64, device=run.device)
        self.counts = torch.zeros(len(counts), dtype=torch.float64)
        self.bins_2K = torch.zeros(2 * BINS, dtype=torch.int64, device=run.device)
        """Tokens by their logit: originals, then replaced ones."""
        self.shown: list[list[Tensor]] = []
        """The beginnings of the first rows of some batches; each but padding has at least one with text."""

    def take(
        self, counts: Sequence[int], figures: Sums, proposal: Proposal, logits_BS: Tensor, rows: MaskedRows
    ) -> None:
        """Take in a batch."""
        segments_BS = rows.segments_BS
        self.sums += torch.stack([figures[name].double() for name in self.reports])
        self.counts += torch.tensor(counts)
        # What is no number has no bin; the loss is no number then, either, and nothing is made of the bins.
        bin_BS = ((logits_BS.nan_to_num().clamp(-LIMIT, LIMIT) + LIMIT) * ((BINS - 1) / (2 * LIMIT))).long()
        bin_BS = torch.where(proposal.is_replaced_BS, bin_BS + BINS, bin_BS)
        # Padding counts as nothing: to leave it out, the device would have to say how many tokens there are.
        self.bins_2K.index_add_(0, bin_BS.flatten(), (segments_BS > 0).flatten().to(self.bins_2K.dtype))
        if self.run.is_first and len(self.shown) < EXAMPLES:
            labelled = rows.labelled.without_padding()
            place_L = labelled.place_L(segments_BS.shape[1])
            original_BS = rows.input_ids_BS.flatten().scatter(0, place_L, labelled.label_L).view_as(segments_BS)
            of_rows = (original_BS, proposal.corrupted_BS, proposal.is_replaced_BS, logits_BS > 0, segments_BS > 0)
            self.shown.append([self.run.fetch(row_BS[:EXAMPLES, :EXAMPLE_TOKENS]) for row_BS in of_rows])

    def conclude(
        self, derived: Callable[[Mapping[str, float]], Mapping[str, float | None]], tokenizer: Tokenizer
    ) -> Evaluation:
        """Means over all ranks' batches, and the panel of examples. Collective."""
        run = self.run
        sums, counts, bins_2K = run.totals(self.sums, self.counts, self.bins_2K)
        totals = dict(zip(self.reports, sums.tolist(), strict=True))
        count_of = dict(zip(self.count_names, counts.tolist(), strict=True))
        told = {name: report.count for name, report in self.reports.items() if not isinstance(report, Tally)}
        values = {name: totals[name] / count_of[count] if count_of[count] else None for name, count in told.items()}
        auc = area_under_curve(*bins_2K.view(2, BINS))
        values |= {**derived(totals), "auc": auc if math.isfinite(totals["discriminator_loss"]) else None}
        shown = ("generator_loss", "discriminator_loss", "f1", "auc")
        line = "  ".join(f"{name.replace('_', ' ')} {values[name]:.4f}" for name in shown if values[name] is not None)
        rows = itertools.chain.from_iterable(examples_of(*of_rows) for of_rows in self.shown)
        examples = [*itertools.islice(rows, EXAMPLES)]
        panel = {"replaced_tokens": table(examples, tokenizer)} if examples else {}
        return Evaluation(values, f"validation {line}", panel)


def area_under_curve(original_K: Tensor, replaced_K: Tensor) -> float | None:
    """The chance that a replaced token's logit is above an original one's, equal ones counting half; None where one
    of the kinds is missing. Arguments are tokens by ascending logit."""
    num_original, num_replaced = int(original_K.sum()), int(replaced_K.sum())
    if not (num_original and num_replaced):
        return None
    original_K, replaced_K = original_K.double(), replaced_K.double()
    below_K = original_K.cumsum(0) - original_K / 2
    return float((replaced_K * below_K).sum() / (num_original * num_replaced))


def examples_of(
    original_BS: Tensor, corrupted_BS: Tensor, is_replaced_BS: Tensor, is_flagged_BS: Tensor, is_token_BS: Tensor
) -> Iterator[Example]:
    """The rows of a batch that have any text."""
    for original_S, corrupted_S, is_replaced_S, is_flagged_S, is_token_S in zip(
        original_BS, corrupted_BS, is_replaced_BS, is_flagged_BS, is_token_BS, strict=True
    ):
        length = int(is_token_S.sum())
        if length:
            columns = (original_S, corrupted_S, is_replaced_S, is_flagged_S)
            yield Example(*(column_S[:length].tolist() for column_S in columns))


def table(examples: Sequence[Example], tokenizer: Tokenizer) -> str:
    """Original, corrupted and judged text side by side, as Markdown; replaced and flagged tokens are in bold."""
    nothing = [False] * EXAMPLE_TOKENS
    rows = (
        " | ".join(
            (
                "",
                marked(example.original, nothing, tokenizer),
                marked(example.corrupted, example.is_replaced, tokenizer),
                marked(example.corrupted, example.is_flagged, tokenizer),
                "",
            )
        ).strip()
        for example in examples
    )
    return "\n".join(["| original | corrupted | judged replaced |", "|---|---|---|", *rows])


def marked(token_ids: Sequence[int], is_marked: Sequence[bool], tokenizer: Tokenizer) -> str:
    """Tokens as a text, the marked ones in bold; neighbours alike are joined first, so that bytes make characters."""
    parts = []
    pairs = zip(token_ids, is_marked, strict=False)
    for bold, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        pieces = [
            tokenizer.id_to_piece(token) if token < tokenizer.vocab_size else f"[ROW {token}]" for token, _ in group
        ]
        text = text_of(pieces)
        blank = " " if text.startswith(" ") else ""
        parts.append(f"{blank}<strong>{plain(text.strip())}</strong>" if bold else plain(text))
    return "".join(parts).strip()
