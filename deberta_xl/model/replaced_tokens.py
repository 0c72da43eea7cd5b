"""Replaced token detection (He et al. 2023, arXiv 2111.09543): a generator that proposes, a discriminator that judges.

Shape suffixes of this file:
    B batch   S sequence   L labelled positions   D hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deberta_xl.kernels.sampling import DrawRule
from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.embeddings import SharedEmbeddings, position_ids
from deberta_xl.model.layer import ACTIVATIONS
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.parts import Part, discriminator_parts, replaced_tokens_parts, with_heads
from deberta_xl.model.trunk import Trunk, shapes_of_model
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.objectives import Sharing


class Detector(nn.Module):
    """The discriminator's head: one logit for each token, of its own state and that of its document's first token."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_BSD: Tensor, segments_BS: Tensor) -> Tensor:
        """Logits [B, S], at least float32; above 0 says that the token was replaced."""
        index_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
        first_BS = index_S - position_ids(segments_BS)
        first_BSD = hidden_BSD.gather(1, first_BS.unsqueeze(-1).expand_as(hidden_BSD))
        # The paper's text has the token's state alone; its code, and so all released weights, add the first token's.
        transformed_BSD = self.activation(self.dense(self.norm(first_BSD + hidden_BSD)))
        logits_BS = self.classifier(transformed_BSD).squeeze(-1)
        return logits_BS.to(torch.promote_types(logits_BS.dtype, torch.float32))


class Discriminator(Trunk):
    """Says of each token of a text whether it was replaced."""

    def __init__(self, config: DebertaConfig, sharing: Sharing = "none", seed: int = 0):
        """Fresh weights from `seed`; what is added to a lender's tables begins at zero.

        With sharing `gdes` or `es`, `embeddings.borrow_from` has to be given the generator's embeddings.
        """
        self.sharing = sharing
        with torch.device("meta"):  # allocated and drawn below
            super().__init__(config)
            if sharing != "none":
                self.embeddings = SharedEmbeddings(config, is_disentangled=sharing == "gdes")
            elif not config.position_biased_input:
                del self.embeddings.position  # there is no enhanced mask decoder to read it
            self.detector = Detector(config)
        self.draw_weights(seed)
        for name, table in self.embeddings.named_children():
            if name.endswith("_delta"):
                nn.init.zeros_(table.weight)

    def describe(self) -> list[Part]:
        """All of it."""
        return discriminator_parts(self.config, self.sharing)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, dropout_key: DropoutKey | None = None
    ) -> Tensor:
        """Logits [B, S] of having been replaced; `input_ids` and `attention_mask` are as in `Trunk.scene`."""
        scene = self.scene(input_ids, attention_mask, dropout_key)
        return self.detector(self.encode(input_ids, scene), scene.segments_BS)


class Proposal(NamedTuple):
    """What the generator says of a batch."""

    loss: Tensor
    """Its masked-LM loss, divided as asked."""
    guess_L: Tensor
    """Its best guess at each labelled position."""
    corrupted_BS: Tensor
    """The text with a token that was drawn from it at each labelled position."""
    is_replaced_BS: Tensor
    """Where that differs from the original, bool."""


class ReplacedTokenModel(nn.Module):
    """Generator and discriminator, as they are trained together."""

    def __init__(
        self, discriminator: DebertaConfig, generator: DebertaConfig, sharing: Sharing = "gdes", seed: int = 0
    ):
        """Fresh weights from `seed`. Under `torch.device("meta")` nothing is allocated or initialised."""
        super().__init__()
        self.sharing = sharing
        self.generator = MaskedLanguageModel(generator, seed)
        # A seed of its own: layers of equal names would begin as copies.
        self.discriminator = Discriminator(discriminator, sharing, DropoutKey(seed).fold("discriminator").seed)
        if sharing != "none":
            self.discriminator.embeddings.borrow_from(self.generator.embeddings)

    @property
    def parts(self) -> list[Part]:
        """The anatomy of both. Raises ConfigError for a parameter that has been forgotten there."""
        described = replaced_tokens_parts(self.discriminator.config, self.generator.config, self.sharing)
        return with_heads(described, shapes_of_model(self))

    def forward(self, does: Literal["propose", "judge", "learn"], **given: Any) -> Any:
        """`propose`, `judge` or `learn`, by name: what an engine wraps has one call."""
        return getattr(self, does)(**given)

    def propose(
        self,
        input_ids: Tensor,
        segments: Tensor,
        labelled: LabelledPositions,
        *,
        label_count: float,
        draw: DrawRule,
        dropout_key: DropoutKey | None = None,
    ) -> Proposal:
        """The generator's loss at the labelled positions, and the text that it makes by drawing tokens there."""
        key = fold_key(dropout_key, "generator")
        output = self.generator(
            input_ids, segments, labels=labelled, label_count=label_count, dropout_key=key, draw=draw
        )
        drawn_L, labelled = output.drawn_L[: labelled.num_labels], labelled.without_padding()
        place_L = labelled.place_L(input_ids.shape[1])
        corrupted_BS = input_ids.flatten().scatter(0, place_L, drawn_L).view_as(input_ids)
        differs_L = drawn_L != labelled.label_L
        is_replaced_BS = torch.zeros_like(input_ids, dtype=torch.bool).flatten().scatter(0, place_L, differs_L)
        return Proposal(output.loss, output.guess_L, corrupted_BS, is_replaced_BS.view_as(input_ids))

    def judge(self, corrupted: Tensor, segments: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        """The discriminator's logits [B, S] of a text."""
        return self.discriminator(corrupted, segments, dropout_key=fold_key(dropout_key, "discriminator"))

    def learn(self, input_ids: Tensor, segments: Tensor, **given: Any) -> tuple[Proposal, Tensor]:
        """`propose`, and `judge` of what was proposed, in one graph."""
        proposal = self.propose(input_ids, segments, **given)
        return proposal, self.judge(proposal.corrupted_BS, segments, given.get("dropout_key"))


def detection_loss(logits_BS: Tensor, is_replaced_BS: Tensor, segments_BS: Tensor) -> Tensor:
    """Binary cross-entropy summed over all tokens that are no padding."""
    loss_BS = F.binary_cross_entropy_with_logits(logits_BS, is_replaced_BS.to(logits_BS.dtype), reduction="none")
    return (loss_BS * (segments_BS > 0)).sum()


def detection_counts(logits_BS: Tensor, is_replaced_BS: Tensor, segments_BS: Tensor) -> Mapping[str, Tensor]:
    """Tokens that are called replaced (`flagged`), and those of them that are (`hits`)."""
    flagged_BS = (logits_BS > 0) & (segments_BS > 0)
    return {"flagged": flagged_BS.sum(), "hits": (flagged_BS & is_replaced_BS).sum()}
