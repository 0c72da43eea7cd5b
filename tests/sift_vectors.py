"""The original's SiFT on tiny models, loaded for comparison."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from vectors import vector_folders

from deberta_xl.model.task_losses import task_loss
from deberta_xl.model.task_model import TaskModel
from deberta_xl.objectives.sift import Sift
from deberta_xl.settings.architecture import HeadConfig
from deberta_xl.settings.finetuning import SiftSection
from deberta_xl.weights.foreign_config import from_foreign_config
from deberta_xl.weights.names import from_microsoft

CASES = vector_folders("sift")
HEAD = ("pooler.dense.", "classifier.")


def our_name(name: str) -> str | None:
    """Our name of one of the original's parameters; the heads' are the same."""
    return name if name.startswith(HEAD) else from_microsoft(name)


class SiftVector:
    """One case: settings, tensors, and our model with its weights in evaluation mode."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64):
        self.meta = json.loads((folder / "meta.json").read_text())
        config = from_foreign_config(json.loads((folder / "config.json").read_text()))
        self.inputs, self.outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
        gradients = load_file(folder / "grads.safetensors")
        alone = "adv_only."
        self.gradients = {our_name(n): g for n, g in gradients.items() if not n.startswith(alone)}
        self.adversarial_gradients = {
            our_name(n.removeprefix(alone)): g for n, g in gradients.items() if n.startswith(alone)
        }
        self.kind = "regression" if self.meta["num_labels"] == 1 else "classification"
        self.model = TaskModel(config, HeadConfig(kind=self.kind, num_labels=self.meta["num_labels"])).to(dtype).eval()
        weights = {our_name(n): w for n, w in load_file(folder / "weights.safetensors").items()}
        weights.pop("embeddings.position.weight")  # pretraining's decoder alone reads it
        self.model.load_state_dict(weights)
        self.section = SiftSection(
            variant="original", weight=self.meta["vat_lambda"], noise=self.meta["init_perturbation"]
        )  # fmt: skip
        self.sift = Sift(self.section, self.kind)
        self.delta = self.outputs["initial_delta"].to(dtype)

    @property
    def labels(self) -> Tensor:
        """The targets."""
        return self.inputs["labels"]

    def passes(self) -> partial[Tensor]:
        """`predict` of the batch."""
        return partial(self.model.predict, self.inputs["input_ids"], self.inputs["attention_mask"], None, 1)


class Outcome(NamedTuple):
    """What a step with SiFT gives, as means over the examples."""

    clean: Tensor
    task_loss: Tensor
    adversarial_loss: Tensor

    def total(self, weight: float) -> Tensor:
        """What is differentiated."""
        return self.task_loss + weight * self.adversarial_loss


def outcome(vector: SiftVector, predict: object) -> Outcome:
    """One step from the given noise."""
    clean = predict(perturb=vector.sift.entry())
    loss = task_loss(vector.kind, clean, vector.labels) / len(clean)
    adversarial = vector.sift.term(predict, clean, None, vector.delta, None) / len(clean)
    return Outcome(clean, loss, adversarial)
