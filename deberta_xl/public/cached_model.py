"""A language model that reads on: what it has computed of the tokens before is kept, so that a further token costs the
pass of one token.

Kept are each layer's keys and values, those that the enhanced mask decoder attends to among them, the last embeddings
that the convolution reads, and the relative table as each layer projects it. All texts of a batch begin in slot 0, and
a token's slot is its position: so absolute positions and distances are those of each text alone, whatever its length.

Shape suffixes of this file:
    B batch   M tokens read at once   T slots: the longest text   W embeddings before   D hidden   V vocabulary
    N heads on this rank   H head size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.kernels.contract import Memory, RelativeRows, Where
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.masked_lm import MaskedLanguageModel, take_rows
from deberta_xl.model.scene import Scene


class CachedLayer:
    """A layer with the keys and values of what it has read."""

    def __init__(self, layer: EncoderLayer, relative_RD: Tensor):
        self.layer = layer
        attention = layer.attention
        self.projected: RelativeRows = attention.project_positions(relative_RD)
        self.memory: Memory | None = None

    def memorize(self, hidden_BMD: Tensor, position_BM: Tensor, num_slots: int) -> None:
        """Put the keys and values of these states into their slots."""
        new = self.layer.attention.memorize(self.layer.attention.entry(hidden_BMD))
        if self.memory is None:
            # Zeros: a slot that nobody has filled is multiplied by a probability of 0, and must be a number for that.
            batch, heads, _, size = new.key_BNTH.shape
            self.memory = Memory(*(part.new_zeros(batch, heads, num_slots, size) for part in new))
        row_B1 = torch.arange(len(position_BM), device=position_BM.device).unsqueeze(1)
        for slots_BNTH, part_BNMH in zip(self.memory, new, strict=True):
            slots_BNTH[row_B1, :, position_BM] = part_BNMH.transpose(1, 2)

    def refine(self, source_BMD: Tensor, scene: Scene) -> Tensor:
        """The layer applied to states that attend to what has been memorized."""
        return self.layer.refine(source_BMD, self.memory, scene._replace(projected=self.projected))

    def keep(self, row_K: Tensor) -> None:
        """Forget all texts but these."""
        self.memory = Memory(*(part.index_select(0, row_K) for part in self.memory))


class CachedModel:
    """A batch of texts as far as a model has read them."""

    def __init__(self, model: MaskedLanguageModel, open_BT: Tensor):
        """`open_BT`, bool, says which slots are seen from everywhere, as in `Trunk.scene`: those of a prefix. They are
        read at once, in the first call of `read`; T is the room for each text."""
        self.model = model
        self.scene = model.scene(open_BT, open_BS=open_BT)
        passes = model.decoder.layers_of_passes(model.encoder)
        cached = {layer: CachedLayer(layer, self.scene.relative_RD) for layer in [*model.encoder.layers, *passes]}
        self.ordinary = [cached[layer] for layer in model.encoder.layers[: model.num_ordinary_layers]]
        self.passes = [cached[layer] for layer in passes]
        """Those of the decoder; one of shared weights has the same layer in each."""
        self.num_read_B = torch.zeros(len(open_BT), dtype=torch.int64, device=open_BT.device)
        self.recent_BWD: Tensor | None = None
        """Embeddings of the last tokens, as many as the convolution's window has on one side; zeros before a text."""

    def read(self, input_ids_BM: Tensor, count_B: Tensor) -> Tensor:
        """Logits of the token that follows, [B, V], after the next `count_B` tokens of each text, at least one.

        What stands behind them in a row is padding; it leaves nothing that is seen later. Where the vocabulary is
        divided over ranks, the logits are this rank's columns.
        """
        model = self.model
        position_BM = self.num_read_B.unsqueeze(1) + torch.arange(input_ids_BM.shape[1], device=input_ids_BM.device)
        scene = self.scene.of_queries(position_BM)
        hidden_BMD = embedded_BMD = model.embeddings(
            input_ids_BM, torch.ones_like(input_ids_BM), position_BS=position_BM
        )
        for number, layer in enumerate(self.ordinary):
            layer.memorize(hidden_BMD, position_BM, self.num_slots)
            hidden_BMD = layer.refine(hidden_BMD, scene)
            if number == 0 and model.encoder.convolution is not None:
                hidden_BMD = self.convolve(embedded_BMD, hidden_BMD, position_BM, count_B)
        decoded_B1D = self.decode(hidden_BMD, position_BM, count_B.unsqueeze(1) - 1)
        self.num_read_B = self.num_read_B + count_B
        return model.head(decoded_B1D, model.embeddings.word).squeeze(1)

    @property
    def num_slots(self) -> int:
        """The room for each text."""
        return self.scene.segments_BS.shape[1]

    def convolve(self, embedded_BMD: Tensor, hidden_BMD: Tensor, position_BM: Tensor, count_B: Tensor) -> Tensor:
        """The n-gram convolution beside the first layer, over these embeddings and those before them."""
        convolution = self.model.encoder.convolution
        reach = convolution.weight.shape[-1] // 2
        if self.recent_BWD is None:
            self.recent_BWD = embedded_BMD.new_zeros(len(embedded_BMD), reach, embedded_BMD.shape[-1])
        known_BSD = torch.cat([self.recent_BWD, embedded_BMD], dim=1)
        open_BS = F.pad(self.scene.where.open_BT.gather(1, position_BM), (reach, 0))
        where = Where(torch.ones_like(open_BS, dtype=torch.int64), self.scene.where.buckets, open_BT=open_BS)
        last_BW = count_B.unsqueeze(1) + torch.arange(reach, device=count_B.device)
        self.recent_BWD = take_rows(known_BSD, last_BW)
        return convolution(known_BSD, F.pad(hidden_BMD, (0, 0, reach, 0)), where)[:, reach:]

    def decode(self, hidden_BMD: Tensor, position_BM: Tensor, last_B1: Tensor) -> Tensor:
        """The decoded state of each text's last token, [B, 1, D]."""
        for layer in dict.fromkeys(self.passes):
            layer.memorize(hidden_BMD, position_BM, self.num_slots)
        query_B1D, position_B1 = take_rows(hidden_BMD, last_B1), position_BM.gather(1, last_B1)
        if self.model.config.decodes_positions:
            query_B1D = query_B1D + self.model.embeddings.position(position_B1)
        scene = self.scene.of_queries(position_B1)
        for layer in self.passes:
            query_B1D = layer.refine(query_B1D, scene)
        return query_B1D

    def keep(self, row_K: Tensor) -> None:
        """Forget all texts but those of these rows (int64), which become rows 0 … K−1."""
        where = self.scene.where
        open_KT = where.open_BT.index_select(0, row_K)
        self.scene = self.scene._replace(
            where=Where(torch.ones_like(open_KT, dtype=torch.int64), where.buckets, open_BT=open_KT)
        )
        self.num_read_B = self.num_read_B.index_select(0, row_K)
        if self.recent_BWD is not None:
            self.recent_BWD = self.recent_BWD.index_select(0, row_K)
        for layer in dict.fromkeys([*self.ordinary, *self.passes]):
            layer.keep(row_K)
