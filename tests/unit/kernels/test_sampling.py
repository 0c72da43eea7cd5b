"""Tokens drawn by a counter: their frequencies, and that nothing but seed and position decides them."""

import pytest
import torch
from torch import Tensor

from deberta_xl.kernels.sampling import Drawn, draw_tokens, gumbel_noise

NUM_DRAWS, NUM_TOKENS = 100_000, 40
HIGHEST_CHI_SQUARE = 80
"""39 degrees of freedom exceed it once in 10,000 times; the seeds are fixed."""


def draw(logits_LV: Tensor, seed: int = 123456789012345678, **columns: int) -> Drawn:
    """Position 0, 1, … of one sequence."""
    position_L = torch.arange(len(logits_LV))
    return draw_tokens(logits_LV, position_L, torch.full_like(position_L, seed), **columns)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("varies", ["position", "seed"])
def test_tokens_come_as_often_as_the_softmax_says(temperature, varies):
    logits_V = torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(1)) * 2
    counter_L, fixed_L = torch.arange(NUM_DRAWS), torch.full((NUM_DRAWS,), 987654321987654321)
    position_L, seed_L = (
        (counter_L, fixed_L) if varies == "position" else (fixed_L % 512, fixed_L + counter_L * 77777777)
    )
    drawn = draw_tokens(logits_V.expand(NUM_DRAWS, -1), position_L, seed_L, temperature)
    expected_V = NUM_DRAWS * (logits_V / temperature).softmax(-1)
    counts_V = torch.bincount(drawn.token_L, minlength=NUM_TOKENS)
    is_frequent_V = expected_V > 5
    assert ((counts_V - expected_V) ** 2 / expected_V)[is_frequent_V].sum() < HIGHEST_CHI_SQUARE


def test_parts_of_the_vocabulary_draw_together_what_the_whole_draws():
    logits_LV = torch.randn(300, NUM_TOKENS)
    cuts = ((0, 13), (13, NUM_TOKENS))
    parts = [draw(logits_LV[:, a:b], first_column=a, num_columns=NUM_TOKENS) for a, b in cuts]
    best_1L = torch.stack([part.value_L for part in parts]).argmax(0, keepdim=True)
    together_L = torch.stack([part.token_L for part in parts]).gather(0, best_1L)[0]
    assert torch.equal(together_L, draw(logits_LV).token_L)


def test_a_draw_does_not_depend_on_the_other_positions_nor_on_how_many_are_made_at_once(monkeypatch):
    logits_LV, position_L = torch.randn(64, NUM_TOKENS), torch.arange(64) % 16
    seed_L = torch.arange(64) // 16 + 2**40
    whole_L = draw_tokens(logits_LV, position_L, seed_L).token_L
    chosen = torch.tensor([50, 3, 17])
    assert torch.equal(draw_tokens(logits_LV[chosen], position_L[chosen], seed_L[chosen]).token_L, whole_L[chosen])
    monkeypatch.setattr("deberta_xl.kernels.sampling.ELEMENTS_AT_ONCE", 3 * NUM_TOKENS)
    assert torch.equal(draw_tokens(logits_LV, position_L, seed_L).token_L, whole_L)
    assert not torch.equal(draw_tokens(logits_LV, position_L, seed_L + 1).token_L, whole_L)


def test_no_position_draws_no_token():
    assert draw(torch.empty(0, 7)).token_L.shape == (0,)


def test_the_noise_is_gumbels():
    seed_C = torch.full((2000,), 2**55 + 77)
    noise_CV = gumbel_noise(torch.arange(2000), seed_C, torch.arange(500, dtype=torch.int32), 500)
    assert noise_CV.isfinite().all()
    # A million draws: mean γ and variance π²/6, within four standard errors.
    assert float(noise_CV.mean()) == pytest.approx(0.5772, abs=0.0052)
    assert float(noise_CV.var()) == pytest.approx(1.6449, abs=0.0139)
