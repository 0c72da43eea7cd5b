"""The enhanced mask decoder (arXiv 2006.03654, section 3.2): absolute positions enter just before the output.

In the paper's words it has two inputs: H, the states of the previous layer, which keys and values come from, and I,
which the first of n layers takes its queries from, and whose output the next one takes. As released, the n = 2 layers
are the encoder's last one twice, and I is H with absolute positions added. With I = H and n = 1 it is BERT's decoder
layer.

Shape suffixes of this file:
    B batch   S sequence   M queries to decode   D hidden
"""

from __future__ import annotations

from torch import Tensor, nn

from deberta_xl.model.encoder import Encoder
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.scene import Scene
from deberta_xl.settings.architecture import DebertaConfig


class EnhancedMaskDecoder(nn.Module):
    """n passes over the states H; without weights, where it applies the encoder's last layer."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_own_decoder_layers))
        """Of its own, one for each pass; none where they are shared."""
        self.num_passes = config.num_decoder_passes

    def forward(self, hidden_BSD: Tensor, query_BMD: Tensor, scene: Scene, encoder: Encoder) -> Tensor:
        """Decode M queries per sequence (I), [B, M, D], attending to the states `hidden_BSD` (H).

        `hidden_BSD` is what the encoder's last layer reads where that is applied here, or gives otherwise; `scene` is
        that of the queries. Keys and values come from `hidden_BSD` in every pass, so a layer that is applied again has
        them already. Queries do not see each other: decoding only the labelled positions is exact.
        """
        memory = None
        for number, layer in enumerate(self.layers_of_passes(encoder)):
            if memory is None or self.layers:
                memory = layer.attention.memorize(layer.attention.entry(hidden_BSD))
            pass_scene = scene.within("enhanced_mask_decoder", number)
            query_BMD = encoder.apply_layer(layer.refine, query_BMD, memory, scene=pass_scene)
        return query_BMD

    def layers_of_passes(self, encoder: Encoder) -> list[EncoderLayer]:
        """The layer that each pass applies: one of its own, or the encoder's last."""
        return list(self.layers) or [encoder.layers[-1]] * self.num_passes
