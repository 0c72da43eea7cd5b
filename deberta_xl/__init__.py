"""deberta_xl: pretraining and fine-tuning of DeBERTa encoders at scale.

    from deberta_xl import DebertaConfig, DebertaForMaskedLM

The public names are loaded when they are first used, so that a mistake in a configuration is reported before torch is
imported.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

HOMES = {
    "DebertaConfig": "deberta_xl.settings.architecture",
    "DebertaForDetection": "deberta_xl.public.detection",
    "DebertaForMaskedLM": "deberta_xl.public.pretrained",
    "DebertaForTask": "deberta_xl.public.finetuned",
    "Tokenizer": "deberta_xl.data.tokenizer",
}
__all__ = ["DebertaConfig", "DebertaForDetection", "DebertaForMaskedLM", "DebertaForTask", "Tokenizer"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in HOMES:
        raise AttributeError(f"module 'deberta_xl' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
