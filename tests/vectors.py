"""The original code's outputs on tiny random models (tests/fixtures/reference_vectors), loaded for comparison."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.weights.foreign_config import from_foreign_config
from deberta_xl.weights.names import from_microsoft

VECTORS = Path(__file__).parent / "fixtures" / "reference_vectors"


class Vector:
    """One case: its settings, tensors, and our model with its weights in evaluation mode."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64):
        self.meta = json.loads((folder / "meta.json").read_text())
        self.config = from_foreign_config(json.loads((folder / "config.json").read_text()))
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.gradients = {from_microsoft(k): v for k, v in load_file(folder / "grads.safetensors").items()}
        weights = {from_microsoft(name): tensor for name, tensor in load_file(folder / "weights.safetensors").items()}
        self.model = MaskedLanguageModel(self.config).to(dtype).eval()
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        self.missing = set(missing)


def folders(kind: str, root: Path = VECTORS) -> list[Path]:
    """The cases of a kind, in a stable order."""
    return [f.parent for f in sorted(root.glob("*/meta.json")) if json.loads(f.read_text())["kind"] == kind]


def vector_folders(kind: str) -> list[Path]:
    """The cases of a kind among the fixtures, and in the folder that DEBERTA_REFERENCE_VECTORS names, if any."""
    more = os.environ.get("DEBERTA_REFERENCE_VECTORS")
    return [folder for root in (VECTORS, *([Path(more)] if more else [])) for folder in folders(kind, root)]
