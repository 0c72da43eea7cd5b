"""The masked language model: embeddings, encoder, enhanced mask decoder, head and loss.

Shape suffixes of this file:
    B batch   S sequence   M slots for labelled positions   L labelled positions   D hidden   V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deberta_xl.kernels.sampling import DrawRule
from deberta_xl.kernels.vocabulary import Drawing, Judged, Vocabulary, judge
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.enhanced_mask_decoder import EnhancedMaskDecoder
from deberta_xl.model.layer import ACTIVATIONS, EncoderLayer
from deberta_xl.model.part_costs import LABELS_AT_A_TIME, SLOTS_AT_A_TIME, filled_up
from deberta_xl.model.parts import Part, masked_lm_parts
from deberta_xl.model.scene import Scene
from deberta_xl.model.trunk import Trunk
from deberta_xl.settings.architecture import DebertaConfig


class LabelledPositions(NamedTuple):
    """Where something is to be predicted. Made on the host, it spares the device a synchronisation per step."""

    position_BM: Tensor
    """Positions in the sequence, row by row; unused slots point at position 0."""
    slot_L: Tensor
    """Which of the B·M slots are used, ascending."""
    label_L: Tensor
    """What is to be predicted there."""
    padding: int = 0
    """So many of the last L are none: their label is 0, and their slot the first."""
    num_slots: int | None = None
    """Slots of a sequence without those that are padding; None where none are."""

    @property
    def num_labels(self) -> int:
        """Without padding."""
        return len(self.label_L) - self.padding

    def padded(self, length: int) -> LabelledPositions:
        """The same in a batch of sequences of this length, with labelled positions and slots filled up to multiples.

        What is predicted, its loss and its dropout masks stay as they are, and the sizes of a pass hardly ever change.
        """
        num_labels, num_slots = len(self.label_L), self.position_BM.shape[1]
        more_L = filled_up(max(1, num_labels), LABELS_AT_A_TIME) - num_labels
        more_M = max(num_slots, min(filled_up(num_slots, SLOTS_AT_A_TIME), length)) - num_slots
        slot_L = self.slot_L + self.slot_L // num_slots * more_M
        return LabelledPositions(
            F.pad(self.position_BM, (0, more_M)), F.pad(slot_L, (0, more_L)), F.pad(self.label_L, (0, more_L)),
            padding=more_L, num_slots=num_slots,
        )  # fmt: skip

    def without_padding(self) -> LabelledPositions:
        """Of the labelled positions, those that are."""
        return self._replace(slot_L=self.slot_L[: self.num_labels], label_L=self.label_L[: self.num_labels], padding=0)

    def num_right(self, guess_L: Tensor) -> Tensor:
        """How many guesses are the labels."""
        return ((guess_L == self.label_L) & (self.label_L > 0)).sum()

    def row_BM(self) -> Tensor | None:
        """The numbers of the slots' states, for dropout, as they are without padding; None for those in order."""
        if self.num_slots is None:
            return None
        row_B, slot_M = (torch.arange(size, device=self.slot_L.device) for size in self.position_BM.shape)
        return row_B.unsqueeze(1) * self.num_slots + slot_M

    def place_L(self, length: int) -> Tensor:
        """Number of each labelled position among all of a batch of sequences of this length, row by row."""
        num_slots = self.position_BM.shape[1]
        return self.slot_L // num_slots * length + self.position_BM.view(-1)[self.slot_L]

    def drawing(self, draw: DrawRule, length: int) -> Drawing:
        """By the rule of a batch of sequences of this length, how a token is drawn at each labelled position."""
        place_L = self.place_L(length)
        return Drawing(place_L % length, draw.seed_B[place_L // length], draw.temperature)

    @classmethod
    def of(cls, labels_BS: Tensor) -> LabelledPositions:
        """The positions whose label is above 0 (0 and −100 both mean: not predicted)."""
        row_L, column_L = torch.nonzero(labels_BS > 0, as_tuple=True)
        count_B = torch.bincount(row_L, minlength=labels_BS.shape[0])
        num_slots = max(1, int(count_B.max()))
        first_B = count_B.cumsum(0) - count_B
        slot_L = torch.arange(len(row_L), device=row_L.device) - first_B[row_L] + row_L * num_slots
        position_BM = labels_BS.new_zeros(labels_BS.shape[0], num_slots, dtype=torch.int64)
        position_BM.view(-1)[slot_L] = column_L
        return cls(position_BM, slot_L, labels_BS[row_L, column_L])


class MaskedLMOutput(NamedTuple):
    """What the model returns."""

    loss: Tensor | None
    """Cross-entropy over the labelled positions (a sum divided by their number, or by `label_count`); None without."""
    logits: Tensor | None
    """[B, S, V] without labels; [L, V] at those of a tensor, in row-major order. None at positions found beforehand:
    the loss needs no more than a part of them at a time. Where the vocabulary is divided over ranks, this rank's
    columns."""
    guess_L: Tensor | None = None
    """The best guess at each labelled position."""
    drawn_L: Tensor | None = None
    """On request: a token drawn from the logits of each labelled position."""
    hidden_states: tuple[Tensor, ...] | None = None
    """On request: the embeddings and the states after each layer, N + 1 tensors [B, S, D]."""


class MaskedLanguageModelHead(nn.Module):
    """Decoded state -> logits over the vocabulary, through the word table it shares with the input."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.entry = nn.Identity()
        """Before the vocabulary; where that is divided over ranks, the plan puts in its place what sums gradients."""
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.norm = nn.LayerNorm(config.embedding_width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.activation = ACTIVATIONS[config.hidden_act]
        self.vocabulary = Vocabulary(config.vocab_size, range(config.vocab_size))
        """What of it is here; the plan puts another in its place where ranks divide it."""

    def forward(
        self, decoded: Tensor, word: nn.Embedding, label_L: Tensor | None = None, drawing: Drawing | None = None
    ) -> Tensor | Judged:
        """[…, D] -> logits […, V], at least float32; of states [L, D] with their labels, what `judge` makes of them.

        The table comes with its module, so that ZeRO-3 can gather it.
        """
        transformed = self.entry(self.norm(self.activation(self.dense(decoded))))
        if label_L is not None:
            return judge(transformed, word.weight, self.bias, label_L, self.vocabulary, drawing)
        logits = F.linear(transformed, word.weight, self.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class MaskedLanguageModel(Trunk):
    """DeBERTa with its pretraining head."""

    def __init__(self, config: DebertaConfig, seed: int = 0):
        """Fresh weights from `seed`. Under `torch.device("meta")` nothing is allocated or initialised."""
        with torch.device("meta"):  # torch's own initialisation would be thrown away
            super().__init__(config)
            self.decoder = EnhancedMaskDecoder(config)
            self.head = MaskedLanguageModelHead(config)
        self.draw_weights(seed)

    @property
    def num_ordinary_layers(self) -> int:
        """Layers whose states are read: without the last where EMD takes the place of its ordinary pass."""
        return self.config.num_layers - self.config.shares_last_layer

    @property
    def encoder_layers(self) -> dict[str, EncoderLayer]:
        """The encoder's, and the decoder's own."""
        return super().encoder_layers | {f"decoder.layers.{n}": layer for n, layer in enumerate(self.decoder.layers)}

    def describe(self) -> list[Part]:
        """All of it."""
        return masked_lm_parts(self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | LabelledPositions | None = None,
        *,
        label_count: float | None = None,
        output_hidden_states: bool = False,
        dropout_key: DropoutKey | None = None,
        open_BS: Tensor | None = None,
        draw: DrawRule | None = None,
    ) -> MaskedLMOutput:
        """Predict the labelled positions, or every position without labels.

        Args:
            input_ids, attention_mask, dropout_key, open_BS: as in `Trunk.scene`.
            token_type_ids: [batch, sequence]; zeros when absent.
            labels: [batch, sequence], 0 or −100 where nothing is predicted; or the positions found beforehand, of which
                no logits are returned.
            label_count: divisor of the loss, for a mean over more than this batch.
            output_hidden_states: return every layer's states too (the last layer then runs although EMD replaces it).
            draw: draw a token at each labelled position, too.
        """
        scene = self.scene(input_ids, attention_mask, dropout_key, open_BS=open_BS)
        states = self.encoder(
            self.embed(input_ids, scene, token_type_ids),
            scene,
            numbers=range(self.config.num_layers if output_hidden_states else self.num_ordinary_layers),
            keep_states=output_hidden_states,
        )
        labelled = LabelledPositions.of(labels) if isinstance(labels, Tensor) else labels
        hidden_BSD = states[self.num_ordinary_layers if output_hidden_states else -1]
        given = {"label_count": label_count, "draw": draw, "with_logits": isinstance(labels, Tensor)}
        output = self.predict(hidden_BSD, scene, labelled, **given)
        return output._replace(hidden_states=tuple(states) if output_hidden_states else None)

    def predict(
        self,
        hidden_BSD: Tensor,
        scene: Scene,
        labelled: LabelledPositions | None,
        *,
        label_count: float | None = None,
        draw: DrawRule | None = None,
        with_logits: bool = False,
    ) -> MaskedLMOutput:
        """From the states after the ordinary layers to loss, guesses and drawn tokens, or to logits without labels.

        `with_logits` asks for those at the labelled positions, too, all at once.
        """
        hidden_BSD = self.prediction_entry(hidden_BSD)
        decoded = self.decode(hidden_BSD, scene, labelled)
        if labelled is None:
            return MaskedLMOutput(None, self.head(decoded, self.embeddings.word))
        chosen_LD = decoded.flatten(0, 1).index_select(0, labelled.slot_L)
        drawing = None if draw is None else labelled.drawing(draw, hidden_BSD.shape[1])
        loss, guess_L, drawn_L = self.head(chosen_LD, self.embeddings.word, labelled.label_L, drawing)
        divisor = max(1, labelled.num_labels) if label_count is None else label_count
        logits_LV = self.head(chosen_LD, self.embeddings.word) if with_logits else None
        return MaskedLMOutput(loss / divisor, logits_LV, guess_L, drawn_L=drawn_L)

    def decode(self, hidden_BSD: Tensor, scene: Scene, labelled: LabelledPositions | None) -> Tensor:
        """The states to predict from: those of the slots, [B, M, D], or without them at all positions, [B, S, D]."""
        query_BSD = hidden_BSD
        if self.config.decodes_positions:
            query_BSD = hidden_BSD + self.embeddings.positions(scene.segments_BS)
        query_BMD = query_BSD if labelled is None else take_rows(query_BSD, labelled.position_BM)
        if not self.config.num_decoder_passes:
            return query_BMD
        if labelled is not None:
            scene = scene.of_queries(labelled.position_BM, labelled.row_BM())
        return self.decoder(hidden_BSD, query_BMD, scene, self.encoder)


def take_rows(x_BSD: Tensor, position_BM: Tensor) -> Tensor:
    """The rows of each sequence at `position_BM`, [B, M, D]."""
    return x_BSD.gather(1, position_BM.unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1]))
