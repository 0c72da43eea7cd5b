"""The enhanced mask decoder (arXiv 2006.03654, section 3.2): absolute positions enter just before the output.

Shape suffixes of this file:
    B batch   S sequence   M queries to decode   D hidden
"""

from __future__ import annotations

from torch import Tensor

from deberta_xl.model.encoder import ApplyLayer
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.scene import Scene
from deberta_xl.settings.architecture import EMD_PASSES


def enhanced_mask_decoder(
    layer: EncoderLayer, hidden_BSD: Tensor, query_BMD: Tensor, scene: Scene, apply_layer: ApplyLayer
) -> Tensor:
    """Decode M queries per sequence, [B, M, D], attending to the states before the last layer.

    `layer` is the encoder's last layer and `hidden_BSD` its input; `query_BMD` = that input plus the absolute-position
    vectors at the queries' places; `scene` is that of the queries. Keys and values come from `hidden_BSD` in every
    pass, so they are computed once. Queries do not see each other: decoding only the labelled positions is exact.
    """
    memory = layer.attention.memorize(layer.attention.entry(hidden_BSD))
    for number in range(EMD_PASSES):
        pass_scene = scene.within("enhanced_mask_decoder", number)
        query_BMD = apply_layer(layer.refine, query_BMD, memory, scene=pass_scene)
    return query_BMD
