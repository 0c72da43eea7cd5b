"""SiFT, scale-invariant fine-tuning (arXiv 2006.03654, section 4): a virtual adversary at the normalised embeddings.

A perturbation δ is drawn, moved `steps` times in the direction that changes the predictions most, and the model is
asked to predict with it what it predicts without. δ is an argument of the pass that it perturbs: no hook, no state, and
its gradient is taken with respect to δ alone (`torch.autograd.grad`), so the parameters' gradients are untouched.

`original` repeats the released code. Where `corrected`, the default, departs from it:

* Divergence: the original's value is a symmetric cross-entropy, nearly all of which is the entropy of the
  predictions; ours is the divergence, so 0 means equal predictions. The gradients are the same.
* Regression: the original takes a softmax over the examples of the batch; ours is the squared difference.
* Entry: the original normalises embeddings without affine, perturbs, and lets the model's LayerNorm normalise once
  more, in clean passes and in evaluation, too. Ours adds δ times each token's own deviation to the sum before the one
  LayerNorm, which is the same perturbation of the normalised vector; a clean pass is the plain model's.
* Step: the original moves each coordinate by up to 1e-4 against a noise of 1e-2, and never projects; ours moves by 0.05
  in the L2 norm relative to the normalised vector's (whose elements have deviation 1), and projects to a ball of 0.05.
* The original's hook could perturb only the module created last; here δ belongs to its pass.

Both draw fresh dropout masks for every pass, and both keep the perturbed passes' gradient from the word table.

Shape suffixes of this file:
    B rows   S sequence   D hidden   I items   C classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.task_losses import distribution_logits
from deberta_xl.model.task_model import Predict
from deberta_xl.model.trunk import Perturb
from deberta_xl.settings.architecture import HeadKind
from deberta_xl.settings.finetuning import SiftSection

EPSILON = 1e-7
"""Of the normalisation without affine, as in the original."""
RADIUS = 0.05
"""Of the ball that our perturbation stays in, and length of its step; relative to the normalised vector."""


class Sift:
    """The adversarial term for batches of one kind of task."""

    def __init__(self, section: SiftSection, kind: HeadKind):
        self.settings, self.variant = section, VARIANTS[section.variant]
        self.kind = kind

    def entry(self) -> Perturb | None:
        """What a clean pass needs, in training and in evaluation."""
        return normalized if self.settings.normalizes_twice else None

    def with_delta(self, delta_BSD: Tensor) -> Perturb:
        """What adds `delta_BSD` to the normalised embeddings."""

        def perturb(summed_BSD: Tensor) -> Tensor:
            if self.settings.normalizes_twice:
                return (normalized(summed_BSD.detach()) + delta_BSD).to(summed_BSD.dtype)
            fixed_BSD = summed_BSD.detach().to(delta_BSD.dtype)
            deviation_BS1 = fixed_BSD.std(-1, correction=0, keepdim=True)
            return (fixed_BSD + deviation_BS1 * delta_BSD).to(summed_BSD.dtype)

        return perturb

    def draw(self, shape: tuple[int, int, int], key: DropoutKey | None, like: Tensor) -> Tensor:
        """The initial perturbation: normal, cut off at two deviations. Float32 or better, whatever the weights are."""
        generator = None if key is None else key.fold("noise").generator(like.device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        noise_BSD = torch.randn(shape, generator=generator, device=like.device, dtype=dtype)
        return (noise_BSD * self.settings.noise).clamp_(-2 * self.settings.noise, 2 * self.settings.noise)

    def term(
        self, predict: Predict, clean: Tensor, place_I: Tensor | None, delta_BSD: Tensor, key: DropoutKey | None
    ) -> Tensor:
        """The adversarial loss summed over the batch, from clean logits (with their graph) and an initial δ.

        `place_I` are the `labelled_places` of the batch.
        """
        for number in range(self.settings.steps):
            gradient_BSD = self.gradient(predict, clean, place_I, delta_BSD, fold_key(key, "step", number))
            delta_BSD = self.moved(delta_BSD, gradient_BSD)
        logits = predict(dropout_key=fold_key(key, "final"), perturb=self.with_delta(delta_BSD))
        return self.distance(logits, clean, place_I)

    def gradient(
        self, predict: Predict, clean: Tensor, place_I: Tensor | None, delta_BSD: Tensor, key: DropoutKey | None
    ) -> Tensor:
        """The gradient of the distance to the clean predictions, with respect to δ alone."""
        delta_BSD = delta_BSD.detach().requires_grad_()
        logits = predict(dropout_key=key, perturb=self.with_delta(delta_BSD))
        distance = self.inner_distance(logits, clean.detach(), place_I)
        (gradient_BSD,) = torch.autograd.grad(distance, delta_BSD)
        return gradient_BSD

    def moved(self, delta_BSD: Tensor, gradient_BSD: Tensor) -> Tensor:
        """δ after one step; unmoved when the gradient is not finite."""
        return torch.where(gradient_BSD.norm().isfinite(), self.variant.step(delta_BSD, gradient_BSD), delta_BSD)

    def inner_distance(self, logits: Tensor, clean: Tensor, place_I: Tensor | None) -> Tensor:
        """What the steps make large."""
        if self.kind == "regression":
            return squared_difference(logits, clean) / len(logits)  # the original's mean, which its 1e-6 can tell
        return cross_entropy_both_ways(*self.rows(logits, clean, place_I))

    def distance(self, logits: Tensor, clean: Tensor, place_I: Tensor | None) -> Tensor:
        """What is added to the loss, summed over the items."""
        if self.kind == "regression":
            return self.variant.regression(logits, clean)
        return self.variant.divergence(*self.rows(logits, clean, place_I)) / self.rows_per_item(logits)

    def rows(self, logits: Tensor, clean: Tensor, place_I: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both predictions as independent distributions [I, C]."""
        return distribution_logits(self.kind, logits, place_I), distribution_logits(self.kind, clean, place_I)

    def rows_per_item(self, logits: Tensor) -> int:
        """Distributions whose mean is an item's: both ends of a span, all labels of a multi-label example."""
        return {"span": 2, "multi_label": logits.shape[-1]}.get(self.kind, 1)


def normalized(summed_BSD: Tensor) -> Tensor:
    """LayerNorm without affine."""
    return F.layer_norm(summed_BSD, summed_BSD.shape[-1:], eps=EPSILON)


def small_step(delta_BSD: Tensor, gradient_BSD: Tensor) -> Tensor:
    """The original's: 1e-4 along the gradient over its largest element."""
    # 1e-6 is the original's: where the gradient is smaller than that, the step is, too.
    return delta_BSD + 1e-4 * (gradient_BSD / (1e-6 + gradient_BSD.abs().amax(-1, keepdim=True)))


def projected_step(delta_BSD: Tensor, gradient_BSD: Tensor) -> Tensor:
    """Ours: RADIUS along the gradient, then to the nearest point of the ball of RADIUS."""
    width = delta_BSD.shape[-1] ** 0.5  # the norm of a normalised vector
    moved_BSD = delta_BSD + RADIUS * width * F.normalize(gradient_BSD, dim=-1, eps=1e-30)
    length_BS1 = moved_BSD.norm(dim=-1, keepdim=True)
    return moved_BSD * (RADIUS * width / length_BS1.clamp(min=1e-30)).clamp(max=1)


def squared_difference(logits: Tensor, clean: Tensor) -> Tensor:
    """Σ (logits − clean)²."""
    return (logits - clean).square().sum()


def cross_entropy_both_ways(logits_IC: Tensor, clean_IC: Tensor) -> Tensor:
    """Σ over the items of −Σ sg(p) log q − Σ sg(q) log p; in each part the gradient flows through the logarithm."""
    log_q, log_p = logits_IC.log_softmax(-1), clean_IC.log_softmax(-1)
    return -(log_p.detach().exp() * log_q).sum() - (log_q.detach().exp() * log_p).sum()


def softmax_over_batch(logits: Tensor, clean: Tensor) -> Tensor:
    """The original's distance of a regression's outputs."""
    # The mean over one row is the row; the sum over the batch's examples is that many times it.
    return cross_entropy_both_ways(logits[None], clean[None]) * len(logits)


def divergence_both_ways(logits_IC: Tensor, clean_IC: Tensor) -> Tensor:
    """Σ over the items of KL(p ‖ q) + KL(q ‖ p), with the gradient of `cross_entropy_both_ways`.

    Logarithms are subtracted before anything is summed, which keeps the digits of a small divergence.
    """
    log_q, log_p = logits_IC.log_softmax(-1), clean_IC.log_softmax(-1)
    fixed_q, fixed_p = log_q.detach(), log_p.detach()
    return (fixed_p.exp() * (fixed_p - log_q)).sum() + (fixed_q.exp() * (fixed_q - log_p)).sum()


class Variant(NamedTuple):
    """What `sift.variant` decides, beside where δ enters (`SiftSection.normalizes_twice`)."""

    step: Callable[[Tensor, Tensor], Tensor]
    """(δ, gradient) -> δ."""
    divergence: Callable[[Tensor, Tensor], Tensor]
    """(logits, clean) -> their distance summed over the items."""
    regression: Callable[[Tensor, Tensor], Tensor]
    """The same of numbers."""


VARIANTS = {
    "original": Variant(small_step, cross_entropy_both_ways, softmax_over_batch),
    "corrected": Variant(projected_step, divergence_both_ways, squared_difference),
}


def build_sift(section: SiftSection, kind: HeadKind) -> Sift | None:
    """The term, or None where its weight is 0 and the model is to be the plain one."""
    return Sift(section, kind) if section.weight else None
