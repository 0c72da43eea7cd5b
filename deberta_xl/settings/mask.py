"""What attention is asked for by a run of either kind."""

from __future__ import annotations

from typing import Literal

from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.pretraining import RunConfig

Mask = Literal["bidirectional", "causal", "prefix"]
"""Which tokens of its document a token sees: all, those up to itself, or those and the document's prefix."""


def mask_of(config: RunConfig | FinetuneConfig) -> Mask:
    """The mask under which a run trains, if need be besides `bidirectional`."""
    if isinstance(config, FinetuneConfig):
        return "bidirectional"
    forms: dict[str, Mask] = {"causal": "causal", "prefix": "prefix", "mixed": config.autoregressive.form}
    return forms.get(config.train.objective, "bidirectional")
