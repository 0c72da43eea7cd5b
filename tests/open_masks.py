"""Small models under causal and prefix masks: what of a row each of their outputs depends on, by gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig

SEGMENTS = torch.tensor([[1] * 5 + [2] * 7 + [0] * 2, [1] * 14])
#: The first two tokens of a document, all of one and none of another.
PREFIX = torch.tensor([[1, 1, 0, 0, 0] + [0] * 9, [1] * 4 + [0] * 10]).bool()
OPEN = {"causal": torch.zeros_like(PREFIX), "prefix": PREFIX}
#: Every kind of layer there is: shared and own projections of positions, one term and two, n-grams, grouped and wider,
#: rows for each distance, every decoder, and none with absolute positions in the input.
MODELS = {
    "v3": {},
    "convolution": {"conv_kernel_size": 3},
    "wide_convolution_in_groups": {"conv_kernel_size": 5, "conv_groups": 4},
    "own_position_projections": {"share_att_key": False, "position_buckets": 0},
    "c2p": {"pos_att_type": "c2p"},
    "own_decoder_of_states": {"decoder_weights": "own", "decoder_input": "states", "decoder_passes": 1},
    "no_decoder": {"decoder_passes": 0},
    "positions_in_the_input": {"position_biased_input": True, "type_vocab_size": 2, "conv_kernel_size": 3},
}


def build_model(**options: object) -> MaskedLanguageModel:
    """Three layers in float64."""
    sizes = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24, "position_buckets": 4}
    config = DebertaConfig(vocab_size=40, max_position_embeddings=16, **(sizes | options))
    return MaskedLanguageModel(config, seed=2).double().eval()


def sees(segments: Tensor, open_tokens: Tensor) -> Tensor:
    """Which pairs of tokens (i, j) the rule lets see each other, by its words."""
    batch, length = segments.shape
    pairs = torch.zeros(batch, length, length, dtype=torch.bool)
    for row, i, j in torch.cartesian_prod(*map(torch.arange, pairs.shape)).tolist():
        is_together = segments[row, i] == segments[row, j] > 0
        pairs[row, i, j] = is_together and (j <= i or bool(open_tokens[row, j]))
    return pairs


def dependence(
    model: MaskedLanguageModel,
    segments: Tensor,
    open_tokens: Tensor | None,
    whole: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Largest derivative of the logits at each token i with respect to the embedding of each j, [B, S, S].

    `whole` joins the gradients of a sequence of which this rank has a slice.
    """
    ids = torch.randint(4, 40, segments.shape, generator=torch.Generator().manual_seed(0)) * (segments > 0)
    leaves = []

    def become_leaf(_module: torch.nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    with model.embeddings.register_forward_hook(become_leaf):
        logits = model(ids, segments, open_BS=open_tokens).logits
    weighted = (logits * torch.linspace(0.5, 1.5, logits.shape[-1], dtype=logits.dtype)).sum(-1)
    rows = [torch.autograd.grad(weighted[:, i].sum(), leaves[0], retain_graph=True)[0] for i in range(len(ids[0]))]
    return torch.stack([whole(row) for row in rows], dim=1).abs().amax(-1)
