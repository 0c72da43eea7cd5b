"""The original's replaced token detection on tiny random models: its losses, logits and gradients, and our pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from deberta_xl.kernels.sampling import DrawRule
from deberta_xl.kernels.vocabulary import Verdict
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.model.replaced_tokens import ReplacedTokenModel, detection_loss
from deberta_xl.weights.foreign_config import from_foreign_config
from deberta_xl.weights.names import DELTA, from_microsoft

DETECTOR = {"LayerNorm": "norm", "dense": "dense", "classifier": "classifier"}


def our_name(name: str) -> str:
    """The original's name of a parameter of the pair, as ours."""
    model, _, rest = name.partition(".")
    if rest.startswith("mask_predictions."):
        _, module, kind = rest.split(".")
        return f"{model}.detector.{DETECTOR[module]}.{kind}"
    ours = from_microsoft(rest.replace(DELTA, ".weight"))
    return f"{model}.{ours.replace('.weight', '_delta.weight') if rest.endswith(DELTA) else ours}"


class Outcome(NamedTuple):
    """What a pair computes of a case; the total is differentiable."""

    generator_loss: Tensor
    discriminator_loss: Tensor
    logits_BS: Tensor
    total: Tensor


def drawing(token_L: Tensor, join: Callable[[Verdict], Verdict], verdict: Verdict) -> Verdict:
    """What the vocabulary says of each position, but with these tokens drawn."""
    joined = join(verdict)
    return joined._replace(token_WL=torch.stack([joined.token_WL[0], token_L]))


class PairVector:
    """A reference case: its pair with its weights in evaluation mode, and what the original computes of it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64):
        config = json.loads((folder / "config.json").read_text())
        self.weight = json.loads((folder / "meta.json").read_text())["rtd_lambda"]
        architectures = (from_foreign_config(config[name]) for name in ("discriminator", "generator"))
        self.model = ReplacedTokenModel(*architectures, config["embedding_sharing"]).to(dtype).eval()
        self.inputs, self.outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
        read = {our_name(k): v for k, v in load_file(folder / "weights.safetensors").items()}
        self.gradients = {our_name(k): v for k, v in load_file(folder / "grads.safetensors").items()}
        missing, self.unread = self.model.load_state_dict(read, strict=False)
        assert not missing

    def outcome(self, call: Callable[..., Any]) -> Outcome:
        """What `call`, the model or an engine around it, computes, when the original's tokens are drawn."""
        ids, segments, labels = (self.inputs[name] for name in ("input_ids", "attention_mask", "labels"))
        labelled = LabelledPositions.of(labels)
        sampled_L = self.outputs["discriminator_input_ids"][labels > 0]
        head = self.model.generator.head
        head.vocabulary = replace(head.vocabulary, join=partial(drawing, sampled_L, head.vocabulary.join))
        proposal, logits_BS = call(
            "learn", input_ids=ids, segments=segments, labelled=labelled, label_count=len(labelled.label_L),
            draw=DrawRule(torch.zeros(len(ids), dtype=torch.int64)),
        )  # fmt: skip
        loss = detection_loss(logits_BS, proposal.is_replaced_BS, segments) / segments.sum()
        return Outcome(proposal.loss, loss, logits_BS * segments, proposal.loss + self.weight * loss)

    def check(self, outcome: Outcome, tolerance: float) -> None:
        """Losses and logits are the original's."""
        expected = self.outputs
        logits_BS = expected["discriminator_logits"] * self.inputs["attention_mask"]
        pairs = [
            (outcome.generator_loss, expected["generator_loss"]),
            (outcome.discriminator_loss, expected["discriminator_loss"]),
            (outcome.logits_BS, logits_BS),
            (outcome.total, expected["total_loss"]),
        ]
        for actual, wanted in pairs:
            torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance)
