"""What may be drawn, and how often it is."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.public.sampling import Sampling, choose_tokens, kept_logits

PROBABILITIES = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.1, 0.05]], dtype=torch.float64)
LOGITS = PROBABILITIES.log() + 7  # a constant changes nothing


def shares(**options: float) -> list[float]:
    """What the tokens are drawn with, rounded."""
    return [round(share, 6) for share in kept_logits(LOGITS, Sampling(**options)).softmax(-1)[0].tolist()]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 2}),  # of equals the one with the lower id
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 2, "top_p": 0.5}, {1}),  # 0.4 of the 0.7 that top_k has left is 0.57
        ({"top_k": 2, "top_p": 0.6}, {1, 3}),
        ({"top_p": 0.6, "temperature": 0.5}, {1, 3}),  # 0.16 of 0.285 is 0.56
        ({"top_p": 0.55, "temperature": 0.5}, {1}),
    ],
    ids=str,
)
def test_what_is_kept_has_the_models_shares_of_what_is_kept(options, kept):
    powered = PROBABILITIES[0] ** (1 / options.get("temperature", 1.0))
    total = sum(float(powered[token]) for token in kept)
    assert shares(**options) == [round(float(p) / total, 6) if i in kept else 0 for i, p in enumerate(powered)]


def test_any_temperature_leaves_numbers():
    assert shares(temperature=1e-308) == [0, 1, 0, 0, 0, 0]
    assert shares(temperature=1e300) == [round(1 / 6, 6)] * 6


def test_what_is_forbidden_is_never_drawn():
    logits_BV = LOGITS.masked_fill(torch.tensor([False, True, False, False, True, True]), float("-inf")).expand(300, -1)
    token_B = choose_tokens(logits_BV, Sampling(temperature=3.0), range(300), [5] * 300)
    assert set(token_B.tolist()) == {0, 2, 3}


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    number = 2000
    options = Sampling(temperature=1.3, seed=11)
    token_B = choose_tokens(LOGITS.expand(number, -1), options, range(number), [3] * number)
    expected = kept_logits(LOGITS, options).softmax(-1)[0] * number
    chi_square = ((torch.bincount(token_B, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded by one seed in a thousand


def test_places_of_one_text_are_drawn_independently():
    """Pairs of neighbours are as frequent as the product of their frequencies."""
    number = 2000
    token_B = choose_tokens(LOGITS.expand(number, -1), Sampling(), [0] * number, range(number))
    observed = torch.bincount(token_B[:-1] * 6 + token_B[1:], minlength=36)
    expected = (PROBABILITIES.T @ PROBABILITIES).flatten() * (number - 1)
    assert ((observed - expected) ** 2 / expected).sum() < 66.6  # 35 degrees of freedom, one in a thousand


def test_a_draw_is_a_function_of_seed_number_and_position():
    numbers, positions = [3, 0, 3, 7], [9, 9, 2, 2]
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    together = choose_tokens(logits_BV, Sampling(seed=5), numbers, positions)
    for row in range(4):
        alone = choose_tokens(logits_BV[row : row + 1], Sampling(seed=5), numbers[row : row + 1], [positions[row]])
        assert alone == together[row]
    draws = [
        choose_tokens(torch.zeros(1, 1000), Sampling(seed=seed), [number], [position]).item()
        for seed in range(3)
        for number in range(3)
        for position in range(3)
    ]
    assert len(set(draws)) > 24


def test_without_sampling_the_most_probable_is_taken():
    assert choose_tokens(LOGITS, None, [0], [0]).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0; for the most probable token"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 must be 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0 must lie above 0 and up to 1"),
        ({"top_p": 1.1}, "top_p=1.1 must lie above 0 and up to 1"),
        ({"seed": -1}, "seed=-1 must lie in"),
    ],
    ids=str,
)
def test_what_draws_nothing_sensible_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**options)
