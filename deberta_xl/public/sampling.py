"""Which token comes next: the most probable one, or one that is drawn.

What is drawn is a function of the seed, the number of the text and the place of the token in it. So it does not depend
on what else is in a batch, nor on how texts are spread over ranks.

Shape suffixes of this file:
    B batch   V vocabulary   K kept tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import frozen
from deberta_xl.data.random_numbers import derive
from deberta_xl.kernels.sampling import draw_tokens


@frozen
class Sampling:
    """How tokens are drawn: logits are divided by the temperature, then top_k and then top_p leave some of them."""

    temperature: float = 1.0
    """Below 1 the probable ones are drawn more often than the model says, above 1 less often."""
    top_k: int | None = None
    """Only the so many most probable ones."""
    top_p: float | None = None
    """Only the fewest that have this probability together."""
    seed: int = 0
    """Another seed draws other texts."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} must be above 0; for the most probable token at each place leave "
                "temperature, top_k and top_p out"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be 1 or more; leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie above 0 and up to 1; leave it out to draw from all tokens")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must lie in 0 … 2^63 - 1")


def choose_tokens(
    logits_BV: Tensor, sampling: Sampling | None, numbers: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """The token that follows in each text, int64 [B]; the most probable one without `sampling`.

    `numbers` are those of the texts, `positions` the places of the tokens in them. Tokens that may not be taken have
    logits of -inf.
    """
    if sampling is None:
        return logits_BV.argmax(-1)
    kept_BV = kept_logits(logits_BV, sampling)
    seeds = (derive(sampling.seed, np.asarray(numbers)) >> np.uint64(1)).astype(np.int64)
    seed_B = torch.from_numpy(seeds).to(kept_BV.device)
    return draw_tokens(kept_BV, torch.tensor(positions, device=kept_BV.device), seed_B).token_L


def kept_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits over the temperature, float64, of the tokens that may be drawn; -inf for the others."""
    # Less the largest, so that no temperature makes them infinite.
    logits_BV = (logits_BV.double() - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits_BV
    # Stable: of equally probable tokens the one with the lower id comes first, on every device.
    sorted_BK, id_BK = logits_BV.sort(dim=-1, descending=True, stable=True)
    sorted_BK, id_BK = sorted_BK[:, : sampling.top_k], id_BK[:, : sampling.top_k]
    if sampling.top_p is not None:
        share_BK = sorted_BK.softmax(-1)
        before_BK = share_BK.cumsum(-1) - share_BK
        sorted_BK = sorted_BK.masked_fill(before_BK >= sampling.top_p, float("-inf"))
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, id_BK, sorted_BK)
