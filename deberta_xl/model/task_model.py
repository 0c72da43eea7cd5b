"""The encoder with a head for a task: what is fine-tuned.

Shape suffixes of this file:
    B rows of the batch   S sequence   D hidden   C classes   X examples   O options of an example
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deberta_xl.model.dropout import Dropout, DropoutKey, fold_key
from deberta_xl.model.layer import ACTIVATIONS
from deberta_xl.model.parts import Part, task_parts
from deberta_xl.model.trunk import Perturb, Trunk
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig


class Predict(Protocol):
    """One pass of a model over a batch that is fixed."""

    def __call__(self, *, dropout_key: DropoutKey | None = None, perturb: Perturb | None = None) -> Tensor:
        """The logits."""


class Pooler(nn.Module):
    """The state of [CLS], projected, behind an activation."""

    def __init__(self, config: DebertaConfig, head: HeadConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(head.pooler_dropout)
        self.activation = ACTIVATIONS[head.pooler_act]

    def forward(self, hidden_BSD: Tensor, key: DropoutKey | None = None) -> Tensor:
        """[B, S, D] -> [B, D]."""
        return self.activation(self.dense(self.dropout(hidden_BSD[:, 0], key)))


class TaskModel(Trunk):
    """DeBERTa's encoder with a head. All layers run as they are: the enhanced mask decoder is pretraining's alone.

    The absolute-position table is left out where only that decoder reads it.
    """

    def __init__(self, config: DebertaConfig, head: HeadConfig, seed: int = 0):
        """Fresh weights from `seed`. Under `torch.device("meta")` nothing is allocated or initialised."""
        with torch.device("meta"):  # torch's own initialisation would be thrown away
            super().__init__(config)
            self.pooler = Pooler(config, head) if head.is_pooled else None
            self.classifier = nn.Linear(config.hidden_size, head.num_labels)
        self.head = head
        self.dropout = Dropout(head.dropout)
        if config.decodes_positions:
            self.embeddings.position = None
        self.draw_weights(seed)

    def describe(self) -> list[Part]:
        """All of it."""
        return task_parts(self.config, self.head)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, *,
        num_options: int = 1, objective: Callable[[Predict], Any] | None = None,
        dropout_key: DropoutKey | None = None, perturb: Perturb | None = None,
    ) -> Any:  # fmt: skip
        """Logits, or whatever `objective` makes of them.

        Args:
            input_ids: [batch, sequence]; for `choice` the options of an example are neighbouring rows.
            attention_mask: as in `Trunk.scene`.
            token_type_ids: [batch, sequence]; zeros when absent.
            num_options: rows of one example, for `choice`.
            objective: is given `predict(dropout_key=…, perturb=…)`, which it may call several times. An engine sees
                one forward then, however many passes a step needs.
            dropout_key, perturb: for a single pass, without objective.

        The logits are at least float32: [B, C] for classification and multi_label, [B] for regression, [X, O] for
        choice, [B, S, C] for token and [B, S, 2] for span.
        """
        predict = partial(self.predict, input_ids, attention_mask, token_type_ids, num_options)
        if objective is not None:
            return objective(predict)
        return predict(dropout_key=dropout_key, perturb=perturb)

    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        num_options: int,
        *,
        dropout_key: DropoutKey | None = None,
        perturb: Perturb | None = None,
    ) -> Tensor:
        """One pass: the logits."""
        scene = self.scene(input_ids, attention_mask, dropout_key)
        hidden_BSD = self.encode(input_ids, scene, token_type_ids, perturb)
        features = hidden_BSD if self.pooler is None else self.pooler(hidden_BSD, fold_key(dropout_key, "pooler"))
        logits = self.classifier(self.dropout(features, fold_key(dropout_key, "head")))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.head.kind == "regression":
            return logits.squeeze(-1)
        if self.head.kind == "choice":
            return logits.view(-1, num_options)
        return logits
