"""Replaced token detection, what DeBERTa-v3 is pretrained on (arXiv 2111.09543)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.together import on_rank_zero
from deberta_xl.data.random_numbers import derive
from deberta_xl.kernels.sampling import DrawRule
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.parts import Part, replaced_tokens_parts
from deberta_xl.model.replaced_tokens import Proposal, ReplacedTokenModel, detection_counts, detection_loss
from deberta_xl.objectives.detection import DetectionEvaluation
from deberta_xl.objectives.evaluation import Evaluation, Evaluator, Model, Sums
from deberta_xl.objectives.micro_batch import on_device
from deberta_xl.objectives.objective import Guessing, Mean, Ratio, Reports, Tally, Update
from deberta_xl.objectives.pretraining import Pretraining
from deberta_xl.objectives.rows import KeyedBatch, MaskedRows
from deberta_xl.planning.cost import step_flops
from deberta_xl.run.figures import detection_curves
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.weights.initial_weights import computed_by
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.native import files_beside_weights
from deberta_xl.weights.replaced_tokens import load_initial_pair

DRAWS = 102
"""Purpose of a row's random stream, beside those of masking (`data/masking.py`) and of `autoregressive.py`."""
GENERATOR: Reports = {
    "generator_loss": Mean("labels"),
    "generator_accuracy": Ratio("labels"),
    "replaced_share": Ratio("labels"),
}
"""What the generator's update tells: its masked-LM loss, right guesses, and drawn tokens that are not the original."""
DISCRIMINATOR: Reports = {"discriminator_loss": Mean("tokens"), "flagged": Tally(), "hits": Tally()}
"""What the discriminator's update tells: its loss, tokens that it calls replaced, and those of them that are."""
LOSS: Reports = {"loss": Mean("labels")}
"""What is differentiated; of a whole step generator's + weight · discriminator's."""


class MaskedTokens(NamedTuple):
    """Packed rows, some of whose tokens are masked; all of them are to be judged afterwards."""

    rows: MaskedRows
    draw_seed_B: Tensor
    """From which tokens are drawn."""
    num_tokens: int
    """Without padding."""

    @classmethod
    def of(cls, batch: KeyedBatch) -> MaskedTokens:
        """From arrays."""
        seed_B = torch.from_numpy((derive(batch.key_B, DRAWS) >> np.uint64(1)).astype(np.int64))
        return cls(MaskedRows.of(batch.rows), seed_B, int((batch.rows.segments > 0).sum()))

    @property
    def counts(self) -> tuple[int, int]:
        """Labelled positions, and tokens."""
        return (*self.rows.counts, self.num_tokens)


class Corrupted(NamedTuple):
    """Text in which the generator has replaced tokens; on the device."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    is_replaced_BS: Tensor
    counts: tuple[int, ...]


class ReplacedTokens(Pretraining):
    """Predict masked tokens with a generator, and find with a discriminator those that it got wrong."""

    counts = ("labels", "tokens")
    draws = True

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.section = self.config.replaced_tokens
        self.generator_architecture = generator_architecture(self.architecture, self.config.generator)

    def build(self) -> ReplacedTokenModel:
        """Generator and discriminator."""
        return ReplacedTokenModel(self.architecture, self.generator_architecture, self.section.sharing, self.seed)

    @property
    def parts(self) -> list[Part]:
        """Of both."""
        return replaced_tokens_parts(self.architecture, self.generator_architecture, self.section.sharing)

    def load_initial(self, model: nn.Module) -> None:
        """The weights of `train.init`: both models', or those that one of them can begin with. Collective."""
        if init := self.config.train.init:
            source = on_rank_zero(lambda: find_pretrained(init))
            load_initial_pair(model, source)
            rank_zero("weights from %s", source)

    def micro_batch(self, batch: KeyedBatch) -> MaskedTokens:
        """Masked rows, and from which seeds tokens are drawn for them."""
        return MaskedTokens.of(batch)

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """Those of the discriminator; the generator's architecture, and how tables are shared."""
        generator = computed_by(self.generator_architecture)
        return {**super().fingerprints, "generator": generator, "sharing": self.section.sharing}

    def checkpoint_files(self, step: int) -> Mapping[str, bytes]:
        """Both architectures and the tokenizer."""
        pair = {"generator": self.generator_architecture, "sharing": self.section.sharing}
        return files_beside_weights(self.architecture, self.tokenizer, **pair, learnt=self.learnt(step))

    @property
    def reports(self) -> Reports:
        """The weighted sum of both losses; each; right guesses; replaced tokens; what the discriminator found."""
        return {**LOSS, **GENERATOR, **DISCRIMINATOR}

    def derived(self, totals: Mapping[str, float]) -> Mapping[str, float | None]:
        """Precision, recall and F1 on replaced tokens, of all that were judged."""
        replaced, flagged, hits = (totals[name] for name in ("replaced_share", "flagged", "hits"))
        return {
            "precision": hits / flagged if flagged else None,
            "recall": hits / replaced if replaced else None,
            "f1": 2 * hits / (flagged + replaced) if flagged + replaced else None,
        }

    @property
    def learners(self) -> Mapping[str, float]:
        """Both models, the generator at a rate of its own where it has one."""
        own, common = self.config.generator.learning_rate, self.config.optimizer.learning_rate
        return {"generator": own / common if own else 1.0 if own is None else 0.0, "discriminator": 1.0}

    # A step.

    def step(
        self, update: Update, batches: Sequence[MaskedTokens], shares: Mapping[str, float], keys: Sequence[DropoutKey]
    ) -> Sums:
        """One update of both; decoupled, of the generator first, and then of the discriminator on what was drawn."""
        if self.section.training == "joint":
            return update(self.losses, batches, shares, keys)
        corrupted: list[Corrupted] = []

        def propose(model: Model, batch: MaskedTokens, shares: Mapping[str, float], key: DropoutKey) -> Sums:
            proposal = model("propose", **self.given(batch, shares, key))
            corrupted.append(
                Corrupted(proposal.corrupted_BS, batch.rows.segments_BS, proposal.is_replaced_BS, batch.counts)
            )
            return {"loss": proposal.loss, **generator_figures(proposal, batch)}

        def judge(model: Model, batch: Corrupted, shares: Mapping[str, float], key: DropoutKey) -> Sums:
            logits_BS = model("judge", corrupted=batch.input_ids_BS, segments=batch.segments_BS, dropout_key=key)
            figures = discriminator_figures(logits_BS, batch.is_replaced_BS, batch.segments_BS, shares)
            return {"loss": self.section.weight * figures["discriminator_loss"], **figures}

        first, second = self.learners
        proposed = update(propose, batches, shares, keys, learner=first, reports=LOSS | GENERATOR)
        judged = update(judge, corrupted, shares, keys, learner=second, reports=LOSS | DISCRIMINATOR)
        return {**proposed, **judged, "loss": proposed["loss"] + judged["loss"]}

    def losses(self, model: Model, batch: MaskedTokens, shares: Mapping[str, float], key: DropoutKey | None) -> Sums:
        """Both losses in one graph."""
        proposal, logits_BS = model("learn", **self.given(batch, shares, key))
        return self.figures(batch, proposal, logits_BS, shares)

    def figures(self, batch: MaskedTokens, proposal: Proposal, logits_BS: Tensor, shares: Mapping[str, float]) -> Sums:
        """All of a batch's."""
        judged = discriminator_figures(logits_BS, proposal.is_replaced_BS, batch.rows.segments_BS, shares)
        loss = proposal.loss + self.section.weight * judged["discriminator_loss"]
        return {"loss": loss, **generator_figures(proposal, batch), **judged}

    def given(self, batch: MaskedTokens, shares: Mapping[str, float], key: DropoutKey | None) -> dict[str, Any]:
        """What the model is given of a batch on the device."""
        return {
            "input_ids": batch.rows.input_ids_BS,
            "segments": batch.rows.segments_BS,
            "labelled": batch.rows.labelled,
            "label_count": shares["labels"],
            "draw": DrawRule(batch.draw_seed_B, self.section.temperature),
            "dropout_key": key,
        }

    def step_flops(self, step: int, counts: Mapping[str, float]) -> float:
        """By the models' definition."""
        return step_flops(self.parts, self.load_at(step, counts["labels"]))

    @property
    def guessing(self) -> Guessing:
        """All tokens alike, of the generator."""
        return Guessing("generator_loss", math.log(self.architecture.vocab_size))

    # Held-out data.

    @torch.no_grad()
    def evaluate(self, run: Evaluator) -> Evaluation:
        """The figures of training, the area under the ROC curve, and examples; always under the same draws."""
        whole = dict.fromkeys(self.counts, 1.0)
        found = DetectionEvaluation(run, self.reports, self.counts)
        for host_batch in run.batches(self.held_out(rank=run.rank, size=run.size), does="evaluating"):
            batch = on_device(host_batch, run.device)
            proposal, logits_BS = run.model("learn", **self.given(batch, whole, None))
            figures = self.figures(batch, proposal, logits_BS, whole)
            found.take(host_batch.counts, figures, proposal, logits_BS, batch.rows)
        evaluation = found.conclude(self.derived, self.tokenizer)
        # A mean over labels and one over tokens: their sum is that of the means, as in a step.
        losses = {name: evaluation.values[f"{name}_loss"] for name in ("generator", "discriminator")}
        if None not in losses.values():
            loss = losses["generator"] + self.section.weight * losses["discriminator"]
            evaluation = evaluation._replace(values={**evaluation.values, "loss": loss})
        return evaluation

    def curves(self, lines: Sequence[Mapping[str, float]]) -> Figure:
        """Both losses, and what the discriminator finds."""
        return detection_curves(lines)


def generator_figures(proposal: Proposal, batch: MaskedTokens) -> dict[str, Tensor]:
    """Loss, right guesses and replaced tokens of a batch, whose labels are on the proposal's device."""
    return {
        "generator_loss": proposal.loss.detach(),
        "generator_accuracy": batch.rows.labelled.num_right(proposal.guess_L),
        "replaced_share": proposal.is_replaced_BS.sum(),
    }


def discriminator_figures(
    logits_BS: Tensor, is_replaced_BS: Tensor, segments_BS: Tensor, shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Loss, tokens that are called replaced, and those of them that are."""
    loss = detection_loss(logits_BS, is_replaced_BS, segments_BS) / shares["tokens"]
    return {"discriminator_loss": loss, **detection_counts(logits_BS, is_replaced_BS, segments_BS)}
