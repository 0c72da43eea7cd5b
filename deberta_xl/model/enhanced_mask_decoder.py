"""The enhanced mask decoder (arXiv 2006.03654, section 3.2): absolute positions enter just before the output.

Shape suffixes of this file:
    B batch   S sequence   M queries to decode   D hidden   R relative rows (2k)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deberta_xl.architecture import EMD_PASSES
from deberta_xl.model.disentangled_attention import Pairs
from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.layer import EncoderLayer


def enhanced_mask_decoder(
    layer: EncoderLayer,
    hidden_BSD: Tensor,
    query_BMD: Tensor,
    relative_RD: Tensor,
    pairs: Pairs,
    *,
    apply_layer: Callable[..., Tensor],
    key: DropoutKey | None = None,
) -> Tensor:
    """Decode M queries per sequence, [B, M, D], attending to the states before the last layer.

    `layer` is the encoder's last layer and `hidden_BSD` its input; `query_BMD` = that input plus the absolute-position
    vectors at the queries' places; `pairs` are those of the queries. Keys and values come from `hidden_BSD` in every
    pass, so they are computed once. Queries do not see each other: decoding only the labelled positions is exact.
    """
    memory = layer.attention.memorize(layer.attention.entry(hidden_BSD))
    for number in range(EMD_PASSES):
        pass_key = fold_key(key, "enhanced_mask_decoder", number)
        query_BMD = apply_layer(layer.refine, query_BMD, memory, relative_RD, pairs, pass_key)
    return query_BMD
