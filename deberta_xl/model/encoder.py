"""The encoder: a stack of disentangled layers that share one relative table.

Shape suffixes of this file:
    B batch   S sequence   D hidden
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deberta_xl.kernels.contract import Memory
from deberta_xl.model.dropout import fold_key
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.ngram_convolution import NgramConvolution
from deberta_xl.model.relative_position import RelativePosition
from deberta_xl.model.scene import Scene
from deberta_xl.settings.architecture import DebertaConfig

ApplyLayer = Callable[..., Tensor]
"""How a layer is run: `call` or `recompute`, given what to apply, the states it reads, and the scene."""


def call(function: Callable[..., Tensor], *states: Tensor | Memory, scene: Scene) -> Tensor:
    """Apply a layer and keep its activations."""
    return function(*states, scene)


def recompute(function: Callable[..., Tensor], *states: Tensor | Memory, scene: Scene) -> Tensor:
    """Apply a layer and recompute its activations in the backward pass.

    Non-reentrant: the enhanced mask decoder applies one layer twice, which the reentrant form breaks under ZeRO-2/3.
    The state of torch's generators is kept only where they draw: masks that have a key are a function of it.
    """
    return checkpoint(function, *states, scene, use_reentrant=False, preserve_rng_state=scene.key is None)


class Encoder(nn.Module):
    """Layers 0 … N−1, the relative table, and the n-gram convolution beside layer 0 where configured."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.relative_position = RelativePosition(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.convolution = NgramConvolution(config) if config.conv_kernel_size else None
        self.apply_layer: ApplyLayer = call

    def forward(self, hidden_BSD: Tensor, scene: Scene, *, numbers: range, keep_states: bool = False) -> list[Tensor]:
        """The states [B, S, D] after the layers `numbers`, or only the last of them.

        `hidden_BSD` is what the first of these layers reads: the embeddings for layer 0.
        """
        states = [hidden_BSD]
        for number in numbers:
            source_BSD = hidden_BSD
            hidden_BSD = self.apply_layer(self.layers[number], source_BSD, scene=scene.within("layers", number))
            if number == 0 and self.convolution is not None:
                key = fold_key(scene.key, "convolution")
                hidden_BSD = self.convolution(source_BSD, hidden_BSD, scene.where, key)
            states = [*(states if keep_states else []), hidden_BSD]
        return states
