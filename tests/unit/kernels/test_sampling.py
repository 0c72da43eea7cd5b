"""Tokens drawn by a counter: their frequencies, and that nothing but seed and places decides them."""

import pytest
import torch

from deberta_xl.kernels.sampling import DrawRule, draw_tokens, gumbel_noise

NUM_DRAWS, NUM_TOKENS = 100_000, 40
HIGHEST_CHI_SQUARE = 80
"""39 degrees of freedom exceed it once in 10,000 times; the seed is fixed."""


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature):
    logits_V = torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(1)) * 2
    rule = DrawRule(123456789012345678, temperature)
    drawn = draw_tokens(logits_V.expand(NUM_DRAWS, -1), torch.arange(NUM_DRAWS), rule)
    expected_V = NUM_DRAWS * (logits_V / temperature).softmax(-1)
    counts_V = torch.bincount(drawn.token_L, minlength=NUM_TOKENS)
    is_frequent = expected_V > 5
    chi_square = ((counts_V - expected_V) ** 2 / expected_V)[is_frequent].sum()
    assert chi_square < HIGHEST_CHI_SQUARE


def test_parts_of_the_vocabulary_draw_together_what_the_whole_draws():
    logits_LV = torch.randn(300, NUM_TOKENS)
    row_L, rule = torch.arange(300) * 7, DrawRule(5)
    whole = draw_tokens(logits_LV, row_L, rule)
    cuts = ((0, 13), (13, NUM_TOKENS))
    parts = [draw_tokens(logits_LV[:, start:end], row_L, rule, start, NUM_TOKENS) for start, end in cuts]
    best_1L = torch.stack([part.value_L for part in parts]).argmax(0, keepdim=True)
    assert torch.equal(torch.stack([part.token_L for part in parts]).gather(0, best_1L)[0], whole.token_L)


def test_a_draw_does_not_depend_on_the_other_positions_nor_on_how_many_are_made_at_once(monkeypatch):
    logits_LV, row_L, rule = torch.randn(64, NUM_TOKENS), torch.arange(64), DrawRule(9)
    whole = draw_tokens(logits_LV, row_L, rule).token_L
    chosen = torch.tensor([50, 3, 17])
    assert torch.equal(draw_tokens(logits_LV[chosen], row_L[chosen], rule).token_L, whole[chosen])
    monkeypatch.setattr("deberta_xl.kernels.sampling.ELEMENTS_AT_ONCE", 3 * NUM_TOKENS)
    assert torch.equal(draw_tokens(logits_LV, row_L, rule).token_L, whole)
    assert not torch.equal(draw_tokens(logits_LV, row_L, DrawRule(10)).token_L, whole)


def test_no_position_draws_no_token():
    assert draw_tokens(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), DrawRule(1)).token_L.shape == (0,)


def test_the_noise_is_gumbels():
    noise_CV = gumbel_noise(torch.arange(2000), torch.arange(500), 500, 77)
    assert noise_CV.isfinite().all()
    # A million draws: mean γ and variance π²/6, within four standard errors.
    assert float(noise_CV.mean()) == pytest.approx(0.5772, abs=0.0052)
    assert float(noise_CV.var()) == pytest.approx(1.6449, abs=0.0139)
