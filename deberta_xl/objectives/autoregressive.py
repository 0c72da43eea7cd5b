"""Predicting the next token: under a causal mask, behind a prefix, or in turn with masked tokens.

One DeBERTa for understanding and generation (He et al. 2021, arXiv 2006.03654, appendix A.4, after UniLM): the model is
the masked-LM model. Position i, decoded under a mask that hides what follows, predicts token i + 1.

Shape suffixes of this file:
    B batch   S sequence   K documents of a row, 0 being padding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from deberta_xl.data.loader import Batch
from deberta_xl.data.random_numbers import derive, uniform
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.objectives.evaluation import Evaluation, Evaluator, Model, Sums
from deberta_xl.objectives.masked_evaluation import MaskedEvaluation
from deberta_xl.objectives.masked_examples import MaskedExamples, NextExamples
from deberta_xl.objectives.masked_lm import MaskedLM
from deberta_xl.objectives.objective import Mean, Ratio
from deberta_xl.objectives.rows import KeyedBatch, MaskedRows, Rows
from deberta_xl.run.figures import loss_curves
from deberta_xl.weights.native_config import Form, Learnt

# Purposes of a row's random streams, beside those of masking (`data/masking.py`).
PREFIX, KIND = 100, 101


def next_tokens(ids_BS: np.ndarray, segments_BS: np.ndarray, open_BS: np.ndarray) -> np.ndarray:
    """What each position predicts: the token behind it, where that is of the same document and not open; 0 elsewhere.

    Nothing predicts the last token of a row, [SEP] or padding: a row ends where it is full, not where a text does.
    """
    is_last_BS = np.pad(segments_BS[:, 2:], ((0, 0), (0, 1))) == 0  # padding may follow: a row is a token or two short
    is_predicted = (segments_BS[:, 1:] == segments_BS[:, :-1]) & ~is_last_BS & ~open_BS[:, 1:]
    return np.pad(np.where(is_predicted, ids_BS[:, 1:], 0), ((0, 0), (0, 1)))


def draw_prefixes(segments_BS: np.ndarray, key_B: np.ndarray) -> np.ndarray:
    """Which tokens belong to the prefix of their document, bool [B, S]: of n tokens the first 1 … n − 1, all lengths
    alike likely, as the row's key has it."""
    batch_size, length = segments_BS.shape
    row_B1 = np.arange(batch_size)[:, None]
    num_documents = length + 1
    length_BK = np.bincount((row_B1 * num_documents + segments_BS).ravel(), minlength=batch_size * num_documents)
    length_BK = length_BK.reshape(batch_size, num_documents)
    draw_BK = uniform(derive(key_B, PREFIX)[:, None], np.arange(num_documents))
    prefix_BK = 1 + np.floor(draw_BK * np.maximum(length_BK - 1, 1)).astype(np.int64)
    is_first_BS = np.diff(segments_BS, axis=1, prepend=0) != 0
    place_BS = np.arange(length) - np.maximum.accumulate(np.where(is_first_BS, np.arange(length), 0), axis=1)
    return (segments_BS > 0) & (place_BS < prefix_BK[row_B1, segments_BS])


def next_token_rows(batch: Batch, key_B: np.ndarray | None = None) -> MaskedRows:
    """Rows without masks in which the next token is predicted; with keys only behind a prefix of each document."""
    rows = Rows.of(batch)
    segments_BS = batch.segments
    open_BS = np.zeros(segments_BS.shape, bool) if key_B is None else draw_prefixes(segments_BS, key_B)
    labels_BS = next_tokens(rows.input_ids_BS.numpy(), segments_BS, open_BS)
    labelled = LabelledPositions.of(torch.from_numpy(labels_BS))
    return MaskedRows(rows.input_ids_BS, rows.segments_BS, labelled, torch.from_numpy(open_BS))


def figures_of(found: MaskedEvaluation, prefix: str = "") -> dict[str, float]:
    """What is logged of an evaluation."""
    return {f"{prefix}{name}": getattr(found, name) for name in ("loss", "perplexity", "accuracy")}


def line_of(name: str, found: MaskedEvaluation) -> str:
    """An evaluation in words."""
    return f"{name} {found.loss:.4f}  perplexity {found.perplexity:.2f}  accuracy {100 * found.accuracy:.1f} %"


class Causal(MaskedLM):
    """Predict every next token from those before it."""

    writes_as: ClassVar[Form] = "causal"
    """Under which mask such a model writes on; a class of yours that inherits keeps it."""
    nothing_to_learn = "give longer rows (model.sequence_length, or longer text): no document has two tokens"

    def micro_batch(self, batch: Batch) -> MaskedRows:
        """Every token but the first of a document is predicted."""
        return next_token_rows(batch)

    def learnt(self, step: int) -> Learnt:
        """That the model can write, and how."""
        return super().learnt(step)._replace(objective=self.writes_as)

    def evaluate(self, run: Evaluator) -> Evaluation:
        """Loss, perplexity per token and accuracy; with examples."""
        examples = NextExamples()
        found = self.measured(run, self.micro_batch, watch=examples.watch)
        texts = {"predictions": examples.table(found.guess_L, self.piece_of)} if run.is_first else {}
        return Evaluation(figures_of(found), line_of("validation loss", found), texts)

    def curves(self, lines: Sequence[Mapping[str, float]]) -> Figure:
        """Loss in training and on held-out rows."""
        return loss_curves(lines, "loss (nats per token)")


class Prefix(Causal):
    """Predict every next token behind a prefix, all of which is seen from everywhere."""

    draws = True
    writes_as = "prefix"

    def micro_batch(self, batch: KeyedBatch) -> MaskedRows:
        """A prefix of each document is given; what follows it is predicted."""
        return next_token_rows(*batch)


class Mixed(Causal):
    """In each micro-batch either masked tokens are predicted, or next ones.

    Each kind's loss is a mean over that kind's labels in the global batch; they are weighed by the share that the kind
    has of the step's micro-batches. An evaluation measures both kinds on all held-out rows.
    """

    draws = True

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.form = self.config.autoregressive.form
        self.counts = ("labels", "masked_labels", "masked_batches", f"{self.form}_labels", f"{self.form}_batches")

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """With the form of what is autoregressive."""
        return {**super().fingerprints, "autoregressive.form": self.form}

    def learnt(self, step: int) -> Learnt:
        """That the model can write, too, and in which form."""
        return super().learnt(step)._replace(objective="mixed", form=self.form)

    @property
    def reports(self) -> Mapping[str, Mean | Ratio]:
        """The loss, then loss and right guesses of either kind."""
        kinds = [("masked", "masked_labels"), (self.form, f"{self.form}_labels")]
        losses = {f"{kind}_loss": Mean(labels) for kind, labels in kinds}
        return {"loss": Mean("labels"), **losses, **{f"{kind}_accuracy": Ratio(labels) for kind, labels in kinds}}

    def micro_batch(self, batch: KeyedBatch) -> MaskedRows:
        """Of which kind a micro-batch is, the key of its first row decides."""
        draw = float(uniform(derive(batch.key_B[:1], KIND), np.zeros(1))[0])
        if draw < self.config.autoregressive.share:
            rows = self.next_rows(batch)
            return rows._replace(more_counts=(0, 0, len(rows.labelled.label_L), 1))
        rows = self.masked_rows(batch)
        return rows._replace(more_counts=(len(rows.labelled.label_L), 1, 0, 0))

    def masked_rows(self, batch: KeyedBatch) -> MaskedRows:
        """The kind whose masked tokens are predicted."""
        return MaskedRows.of(batch.rows)

    def next_rows(self, batch: KeyedBatch) -> MaskedRows:
        """The autoregressive kind."""
        return next_token_rows(*batch) if self.form == "prefix" else next_token_rows(batch.rows)

    def kind_of(self, batch: MaskedRows) -> str:
        """`masked`, or the other."""
        return "masked" if batch.open_BS is None else self.form

    def own_shares(self, batch: MaskedRows, shares: Mapping[str, float]) -> Mapping[str, float]:
        """By what the model divides the loss of such a micro-batch."""
        kind = self.kind_of(batch)
        return {"labels": shares[f"{kind}_labels"] / shares[f"{kind}_batches"]}

    def losses(self, model: Model, batch: MaskedRows, shares: Mapping[str, float], key: DropoutKey | None) -> Sums:
        """Cross-entropy at the labelled positions, as the micro-batch's own kind and as the other's nothing."""
        found = super().losses(model, batch, self.own_shares(batch, shares), key)
        return {"loss": found["loss"], **self.by_kind(batch, shares, **found)}

    def by_kind(self, batch: MaskedRows, shares: Mapping[str, float], loss: Tensor, accuracy: Tensor) -> Sums:
        """The figures of either kind."""
        kind = self.kind_of(batch)
        other = self.form if kind == "masked" else "masked"
        return {
            f"{kind}_loss": loss.detach() / shares[f"{kind}_batches"],
            f"{other}_loss": torch.zeros_like(loss),
            f"{kind}_accuracy": accuracy,
            f"{other}_accuracy": torch.zeros_like(accuracy),
        }

    def stage_input(self, batch: MaskedRows, shares: Mapping[str, float], key: DropoutKey | None) -> Any:
        """Everything of a micro-batch, and what its loss is divided by."""
        return super().stage_input(batch, self.own_shares(batch, shares), key)

    def stage_sums(self, batch: MaskedRows, shares: Mapping[str, float], loss: Tensor, guesses: Tensor) -> Sums:
        """The figures of either kind."""
        return self.by_kind(batch, shares, loss, **super().stage_sums(batch, shares, loss, guesses))

    def evaluate(self, run: Evaluator) -> Evaluation:
        """Loss, perplexity per token and accuracy of either kind, on the same rows; and the losses' mean."""
        examples, next_examples = MaskedExamples(), NextExamples()
        masked = self.measured(run, self.masked_rows, watch=examples.watch)
        after = self.measured(run, self.next_rows, watch=next_examples.watch)
        share = self.config.autoregressive.share
        values = {
            "loss": (1 - share) * masked.loss + share * after.loss,
            **figures_of(masked, "masked_"),
            **figures_of(after, f"{self.form}_"),
        }
        line = f"{line_of('validation: masked loss', masked)}  {line_of(f'{self.form} loss', after)}"
        if not run.is_first:
            return Evaluation(values, line)
        texts, pictures = self.shown(masked, examples)
        texts["next_predictions"] = next_examples.table(after.guess_L, self.piece_of)
        return Evaluation(values, line, texts, pictures)
