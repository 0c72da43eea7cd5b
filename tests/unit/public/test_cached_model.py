"""Reading on with what is kept computes what reading everything anew does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.public.cached_model import CachedModel
from deberta_xl.settings.architecture import DebertaConfig

V2 = dict(
    vocab_size=61, hidden_size=24, num_layers=3, num_heads=3, intermediate_size=40, max_position_embeddings=40,
    position_buckets=8,
)  # fmt: skip
ARCHITECTURES = {
    "v2": V2,
    "v2 with a convolution": V2 | {"conv_kernel_size": 3},
    "a wide convolution in groups": V2 | {"conv_kernel_size": 7, "conv_groups": 2},
    "v1": V2 | {"position_buckets": 0, "share_att_key": False, "normalize_relative_table": False},
    "c2p alone": V2 | {"pos_att_type": "c2p"},
    "p2c alone": V2 | {"pos_att_type": "p2c"},
    "content alone": V2 | {"pos_att_type": "none"},
    "no decoder": V2 | {"decoder_passes": 0},
    "one pass over the states": V2 | {"decoder_passes": 1, "decoder_input": "states"},
    "decoder layers of its own": V2 | {"decoder_passes": 3, "decoder_weights": "own", "conv_kernel_size": 3},
    "positions in the input": V2 | {"position_biased_input": True, "embedding_size": 12, "type_vocab_size": 2},
}
LENGTHS = (9, 1, 4)
NUM_STEPS = 12


def build(config: dict) -> MaskedLanguageModel:
    """A model in float64 whose outputs depend on everything."""
    model = MaskedLanguageModel(DebertaConfig(**config)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def anew(model: MaskedLanguageModel, text: list[int], prefix: int) -> Tensor:
    """Logits of the token after a text, of which nothing is known beforehand."""
    open_1S = torch.arange(len(text)).unsqueeze(0) < prefix
    return model(torch.tensor([text]), open_BS=open_1S).logits[0, -1]


@pytest.mark.parametrize("sees_prefix", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_each_text_of_a_batch_has_the_logits_that_it_has_alone_and_read_anew(name, sees_prefix):
    model = build(ARCHITECTURES[name])
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(4, 61, (length,), generator=generator).tolist() for length in LENGTHS]
    open_BT = torch.arange(max(LENGTHS) + NUM_STEPS) < torch.tensor(LENGTHS).unsqueeze(1)
    cached = CachedModel(model, open_BT & sees_prefix)
    padded = torch.tensor([text + [5] * (max(LENGTHS) - len(text)) for text in texts])
    logits_BV = cached.read(padded, torch.tensor(LENGTHS))
    rows = list(range(len(texts)))
    for step in range(NUM_STEPS):
        expected = [anew(model, texts[row], LENGTHS[row] * sees_prefix) for row in rows]
        torch.testing.assert_close(logits_BV, torch.stack(expected), rtol=0, atol=1e-10)
        if step == 5:  # a text has ended
            cached.keep(torch.tensor([0, 2]))
            logits_BV, rows = logits_BV[[0, 2]], [0, 2]
        token_B = logits_BV.argmax(-1)
        for row, token in zip(rows, token_B.tolist(), strict=True):
            texts[row].append(token)
        logits_BV = cached.read(token_B.unsqueeze(1), torch.ones_like(token_B))
