"""The public model: DeBERTa with a head for a task, loaded from and saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch

from deberta_xl.model.task_model import TaskModel
from deberta_xl.weights.finetuned_folder import find_finetuned, write_finetuned
from deberta_xl.weights.foreign import is_foreign_folder
from deberta_xl.weights.foreign_heads import read_foreign_task
from deberta_xl.weights.head_facts import HeadFacts, read_head
from deberta_xl.weights.native import CONFIG_NAME, fill_model, read_weights
from deberta_xl.weights.native_config import read_native_config


class DebertaForTask(TaskModel):
    """DeBERTa fine-tuned for a task. See `TaskModel.forward`."""

    facts: HeadFacts

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """The fine-tuned model in a run, checkpoint or weights folder, or one of transformers', in evaluation mode.

        Raises CheckpointError when files are missing or damaged, or the folder holds no fine-tuned model.
        """
        folder = find_finetuned(directory)
        if is_foreign_folder(folder):
            config, facts, weights = read_foreign_task(folder)
        else:
            config, facts, weights = (
                read_native_config(folder / CONFIG_NAME).architecture,
                read_head(folder),
                read_weights(folder),
            )
        with torch.device("meta"):
            model = cls(config, facts.head)
        model.facts = facts
        fill_model(model, weights, folder, dtype)
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, tokenizer: str | Path | None = None) -> None:
        """Write a weights folder. Raises CheckpointError when it exists and is not empty."""
        weights = {name: p.detach() for name, p in self.named_parameters()}
        write_finetuned(Path(directory), weights, self.config, self.facts, Path(tokenizer) if tokenizer else None)
