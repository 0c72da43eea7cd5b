"""What attention is asked for by a run of either kind."""

from __future__ import annotations

from typing import Literal

from deberta_xl.settings.pretraining import RunConfig

Mask = Literal["bidirectional", "causal", "prefix"]
"""Which tokens of its document a token sees: all, those up to itself, or those and the document's prefix."""


def mask_of(objective: str | None, run: RunConfig) -> Mask:
    """The mask under which a built-in objective trains, if need be besides `bidirectional`; None is no built-in one."""
    forms: dict[str | None, Mask] = {"causal": "causal", "prefix": "prefix", "mixed": run.autoregressive.form}
    return forms.get(objective, "bidirectional")
