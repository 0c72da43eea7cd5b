"""The encoder: a stack of disentangled layers that share one relative table.

Shape suffixes of this file:
    B batch   S queries   T keys   D hidden   R relative rows (2k)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deberta_xl.architecture import DebertaConfig
from deberta_xl.model.disentangled_attention import Pairs
from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.ngram_convolution import NgramConvolution
from deberta_xl.model.relative_position import RelativePosition


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Apply a layer and keep its activations."""
    return function(*arguments)


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Apply a layer and recompute its activations in the backward pass.

    Non-reentrant: the enhanced mask decoder applies one layer twice, which the reentrant form breaks under ZeRO-2/3.
    """
    return checkpoint(function, *arguments, use_reentrant=False)


class Encoder(nn.Module):
    """Layers 0 … N−1, the relative table, and the n-gram convolution beside layer 0 where configured."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.relative_position = RelativePosition(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.convolution = NgramConvolution(config) if config.conv_kernel_size else None
        self.apply_layer = call
        """How a layer is run: `call`, or `recompute` for activation checkpointing."""

    def forward(
        self,
        hidden_BSD: Tensor,
        segments_BS: Tensor,
        relative_RD: Tensor,
        pairs: Pairs,
        *,
        numbers: range,
        keep_states: bool = False,
        key: DropoutKey | None = None,
    ) -> list[Tensor]:
        """The states [B, S, D] after the layers `numbers`, or only the last of them.

        `hidden_BSD` is what the first of these layers reads: the embeddings for layer 0.
        """
        states = [hidden_BSD]
        for number in numbers:
            layer_key = fold_key(key, "layers", number)
            source_BSD = hidden_BSD
            hidden_BSD = self.apply_layer(self.layers[number], source_BSD, relative_RD, pairs, layer_key)
            if number == 0 and self.convolution is not None:
                hidden_BSD = self.convolution(source_BSD, hidden_BSD, segments_BS, fold_key(key, "convolution"))
            states = [*(states if keep_states else []), hidden_BSD]
        return states
