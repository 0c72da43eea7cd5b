"""The public model: DeBERTa with its pretraining head, loaded from and saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch

from deberta_xl.checkpoint.lazy import read_all
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.weights.initial_weights import open_pretrained
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.native import fill_model, write_weights
from deberta_xl.weights.native_config import UNRECORDED, Learnt, native_config


class DebertaForMaskedLM(MaskedLanguageModel):
    """DeBERTa with enhanced mask decoder and masked-LM head.

    `DebertaForMaskedLM(config)` has fresh weights; `from_pretrained` reads them. See `MaskedLanguageModel.forward`.
    """

    learnt: Learnt = UNRECORDED
    """Whether, and how, it has learnt to write (`public/generation.py`), and on how long rows, as its folder says."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """The model in a folder, in evaluation mode.

        `directory` may be a weights folder, a checkpoint or a run folder of ours (the newest whole checkpoint), or a
        folder in the original release's or Hugging Face's layout (v1, v2, v3) with `config.json` (or
        `model_config.json`) and `model.safetensors`, `weights.safetensors`, `pytorch_model.bin`, or shards and index.

        Raises CheckpointError when files are missing or damaged, or tensors do not fit the configuration.
        """
        source = find_pretrained(directory)
        found = open_pretrained(source)
        with torch.device("meta"):
            model = cls(found.config)
        fill_model(model, read_all(found.tensors), source, dtype)
        model.learnt = found.learnt
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, tokenizer: str | Path | None = None) -> None:
        """Write a weights folder: `model.safetensors`, `config.json`, and `tokenizer/` where one is given.

        Raises CheckpointError when the folder exists and is not empty.
        """
        weights = {name: p.detach() for name, p in self.named_parameters()}
        config = native_config(self.config, learnt=self.learnt)
        write_weights(Path(directory), weights, config, Path(tokenizer) if tokenizer else None)
