"""Masked language modelling: what DeBERTa is pretrained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from deberta_xl.data.loader import Batch
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.parts import masked_lm_parts
from deberta_xl.objectives.evaluation import Evaluation, Evaluator, Model, Sums
from deberta_xl.objectives.masked_evaluation import MaskedEvaluation, evaluate_masked_lm, masked_sums
from deberta_xl.objectives.masked_examples import MaskedExamples
from deberta_xl.objectives.objective import Guessing, Mean, Ratio, Staged
from deberta_xl.objectives.pretraining import Pretraining
from deberta_xl.objectives.rows import KeyedBatch, MaskedRows
from deberta_xl.planning.cost import step_flops
from deberta_xl.run.figures import confusion_figure, loss_curves

if TYPE_CHECKING:
    from deberta_xl.parallel.pipeline import StageInput


class MaskedLM(Pretraining, Staged):
    """Predict the masked tokens, through the enhanced mask decoder."""

    def build(self) -> MaskedLanguageModel:
        """Embeddings, encoder, mask decoder and head."""
        return MaskedLanguageModel(self.architecture, self.seed)

    def build_stage(self, units: range) -> MaskedLanguageModel:
        """The same weights, as far as these units have them."""
        from deberta_xl.parallel.pipeline import build_stage  # DeepSpeed has to be told its device first

        return build_stage(self.architecture, units, self.seed)

    @property
    def reports(self) -> Mapping[str, Mean | Ratio]:
        """The loss, and the share of the labels that are guessed right."""
        return {"loss": Mean("labels"), "accuracy": Ratio("labels")}

    def losses(self, model: Model, batch: MaskedRows, shares: Mapping[str, float], key: DropoutKey | None) -> Sums:
        """Cross-entropy over the vocabulary at the labelled positions."""
        output = model(
            batch.input_ids_BS,
            batch.segments_BS,
            labels=batch.labelled,
            label_count=shares["labels"],
            dropout_key=key,
            open_BS=batch.open_BS,
        )
        return masked_sums(output, batch)

    def stage_input(self, batch: MaskedRows, shares: Mapping[str, float], key: DropoutKey | None) -> StageInput:
        """Everything of a micro-batch: each stage has it from its own loader."""
        from deberta_xl.parallel.pipeline import StageInput

        return StageInput(
            batch.input_ids_BS, batch.segments_BS, batch.labelled, shares["labels"], key, open_BS=batch.open_BS
        )

    def stage_guesses(self, batch: MaskedRows) -> Tensor:
        """One for each label."""
        return torch.empty_like(batch.labelled.label_L)

    def stage_sums(self, batch: MaskedRows, shares: Mapping[str, float], loss: Tensor, guesses: Tensor) -> Sums:
        """Right guesses."""
        return {"accuracy": batch.labelled.num_right(guesses)}

    def step_flops(self, step: int, counts: Mapping[str, float]) -> float:
        """By the model's definition."""
        return step_flops(masked_lm_parts(self.architecture), self.load_at(step, counts["labels"]))

    @property
    def guessing(self) -> Guessing:
        """All tokens alike."""
        return Guessing("loss", math.log(self.architecture.vocab_size))

    def evaluate(self, run: Evaluator) -> Evaluation:
        """Loss, perplexity and accuracy; examples in their sentence, and which words are taken for which."""
        examples = MaskedExamples()
        unigram = self.data.log_unigram if run.is_first else None
        found = self.measured(run, self.micro_batch, log_unigram=unigram, watch=examples.watch)
        values = {
            "loss": found.loss,
            "perplexity": found.perplexity,
            "accuracy": found.accuracy,
            "unigram_entropy": found.unigram_entropy,
        }
        if not run.is_first:
            return Evaluation(values, "")
        line = (
            f"validation loss {found.loss:.4f} (unigram of the training set: {found.unigram_entropy:.4f})  "
            f"perplexity {found.perplexity:.2f}  accuracy {100 * found.accuracy:.1f} %"
        )
        return Evaluation(values, line, *self.shown(found, examples))

    def measured(
        self, run: Evaluator, build: Callable[[Batch | KeyedBatch], MaskedRows], **more: Any
    ) -> MaskedEvaluation:
        """The weights on held-out rows, of which `build` makes what is predicted. Collective."""
        return evaluate_masked_lm(
            run,
            self.source(self.valid),
            build,
            vocab_size=self.architecture.vocab_size,
            max_samples=self.config.evaluation.max_samples,
            micro_batch_size=self.config.train.micro_batch_size,
            **more,
        )

    def shown(self, found: MaskedEvaluation, examples: MaskedExamples) -> tuple[dict, dict]:
        """Texts and pictures of an evaluation; none where nothing was masked."""
        if not len(found.label_L):
            return {}, {}
        confusion = confusion_figure(found.label_L, found.guess_L, self.piece_of)
        return {"predictions": examples.table(found.guess_L, self.piece_of)}, {"confusion": confusion}

    def piece_of(self, token_id: int) -> str:
        """The piece of a guess; with a `model.vocab_size` above the tokenizer's there are ids that it does not know."""
        return self.tokenizer.id_to_piece(token_id) if token_id < self.tokenizer.vocab_size else f"[ROW {token_id}]"

    def curves(self, lines: Sequence[Mapping[str, float]]) -> Figure:
        """Loss in training and on held-out rows, and of a guess that reads no context."""
        return loss_curves(lines, "masked-LM loss (nats per token)")
