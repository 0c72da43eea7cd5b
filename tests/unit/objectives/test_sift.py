"""SiFT: the original's numbers, the corrected form's properties, and that parameters' gradients stay untouched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sift_vectors import CASES, SiftVector, outcome

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.task_losses import labelled_places
from deberta_xl.model.task_model import TaskModel
from deberta_xl.objectives.sift import RADIUS, Sift, normalized
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.settings.finetuning import FinetuneConfig, SiftSection
from deberta_xl.settings.presets import load_config

# float64: the original's own rounding is 1e-13; gradients pass through three forwards.
TOLERANCE = 1e-9


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Largest absolute difference."""
    assert actual.shape == expected.shape, what
    difference = (actual - expected).abs().max().item()
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2e}"


@pytest.fixture(params=CASES, ids=lambda folder: folder.name)
def vector(request) -> SiftVector:
    """Each of the original's cases."""
    return SiftVector(request.param)


def test_the_original_variant_gives_the_originals_logits_and_perturbation(vector):
    seen, expected, predict = [], vector.outputs, vector.passes()

    def watched(**options: object) -> torch.Tensor:
        seen.append(predict(**options))
        return seen[-1]

    clean = watched(perturb=vector.sift.entry())
    gradient = vector.sift.gradient(watched, clean, None, vector.delta, None)
    moved = vector.sift.moved(vector.delta, gradient)
    watched(perturb=vector.sift.with_delta(moved))
    names = ("clean_logits", "perturbed_logits_initial", "perturbed_logits_final")
    for logits, name in zip(seen, names, strict=True):
        assert_close(logits, expected[name], name)
    assert_close(gradient, expected["delta_grad"], "gradient of the perturbation")
    assert_close(moved, expected["delta_after_step"], "perturbation after a step")
    summed = vector.model.embeddings.word(vector.inputs["input_ids"])
    assert_close(normalized(summed), expected["normalized_embeddings"], "normalised embeddings")


def test_the_original_variant_gives_the_originals_losses_and_gradients(vector):
    result = outcome(vector, vector.passes())
    weight = vector.meta["vat_lambda"]
    assert_close(result.task_loss, vector.outputs["task_loss"], "task loss")
    assert_close(result.adversarial_loss, vector.outputs["adversarial_loss"], "adversarial loss")
    assert_close(result.total(weight), vector.outputs["total_loss"], "total loss")
    parameters = dict(vector.model.named_parameters())
    for loss, expected in (
        (result.adversarial_loss, vector.adversarial_gradients),
        (result.total(weight), vector.gradients),
    ):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if name in expected:
                assert_close(gradient, expected[name], f"gradient of {name}")
            else:
                assert gradient is None or not gradient.any(), f"{name} has a gradient, the original has none"


def small_model(kind: str, num_labels: int, dropout: float = 0.0) -> TaskModel:
    """Two layers, float64."""
    config = DebertaConfig(
        vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
        max_position_embeddings=24, conv_kernel_size=3, hidden_dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    head = HeadConfig(kind=kind, num_labels=num_labels, dropout=dropout)
    return TaskModel(config, head, seed=2).double()


KINDS = {
    "classification": (3, torch.tensor([0, 2, 1])),
    "regression": (1, torch.tensor([0.5, 4.0, 2.0])),
    "multi_label": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
    "token": (4, torch.where(torch.arange(30).view(3, 10) % 3 == 0, -100, torch.arange(30).view(3, 10) % 4)),
    "span": (2, torch.tensor([[1, 2], [0, 0], [3, 7]])),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows with padding."""
    ids = torch.randint(4, 60, (3, 10), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(10) < torch.tensor([[10], [6], [8]])).long()
    return ids * mask, mask


def predictor(model: TaskModel) -> partial:
    """`predict` of the batch."""
    ids, mask = batch()
    return partial(model.predict, ids, mask, None, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inner_step_leaves_the_parameters_gradients_untouched(kind):
    num_labels, labels = KINDS[kind]
    model = small_model(kind, num_labels)
    predict = predictor(model)
    sift = Sift(SiftSection(weight=1.0, steps=2), kind)
    clean = predict()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    delta = sift.draw((3, 10, 16), DropoutKey(1), clean)
    gradient = sift.gradient(predict, clean, labelled_places(kind, labels), delta, None)
    assert gradient.abs().max() > 0
    assert all(p.requires_grad and torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_corrected_term_is_zero_without_perturbation_and_positive_with_it(kind):
    num_labels, labels = KINDS[kind]
    predict = predictor(small_model(kind, num_labels))
    sift = Sift(SiftSection(weight=1.0), kind)
    clean = predict()
    assert sift.entry() is None
    unperturbed = predict(perturb=sift.with_delta(torch.zeros(3, 10, 16, dtype=torch.float64)))
    # The same function up to the epsilon of the model's own LayerNorm, which is not involved: exact to rounding.
    torch.testing.assert_close(unperturbed, clean, rtol=1e-12, atol=1e-14)
    place = labelled_places(kind, labels)
    assert abs(sift.distance(unperturbed, clean, place).item()) < 1e-12
    term = sift.term(predict, clean, place, sift.draw((3, 10, 16), DropoutKey(1), clean), None)
    assert term.item() > 1e-9


@pytest.mark.parametrize("variant", ["original", "corrected"])
def test_a_step_increases_the_distance(variant):
    model = small_model("classification", 3)
    predict, sift = predictor(model), Sift(SiftSection(weight=1.0, variant=variant), "classification")
    clean = predict(perturb=sift.entry())
    delta = sift.draw((3, 10, 16), DropoutKey(1), clean)
    moved = sift.moved(delta, sift.gradient(predict, clean, None, delta, None))
    before, after = (sift.distance(predict(perturb=sift.with_delta(d)), clean, None) for d in (delta, moved))
    assert after > before


def test_the_corrected_perturbation_stays_in_its_ball_and_the_originals_step_is_small():
    corrected, original = (
        Sift(SiftSection(weight=1.0, variant=v), "classification") for v in ("corrected", "original")
    )
    generator = torch.Generator().manual_seed(4)
    delta, gradient = (torch.randn(3, 10, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    for scale in (1e-3, 1.0, 1e3):
        assert (corrected.moved(scale * delta, gradient).norm(dim=-1) / 4).max() <= RADIUS * (1 + 1e-9)
    assert (original.moved(delta, gradient) - delta).abs().max() <= 1e-4


def test_a_gradient_that_is_not_finite_leaves_the_perturbation():
    sift = Sift(SiftSection(weight=1.0), "classification")
    delta = torch.full((1, 2, 4), 0.01)
    assert torch.equal(sift.moved(delta, torch.tensor([[[1.0, 2, 3, float("nan")], [1, 1, 1, 1]]])), delta)


def test_equal_keys_draw_equal_noise_and_it_is_cut_off():
    sift = Sift(SiftSection(weight=1.0, noise=0.1), "classification")
    first, again, other = (sift.draw((2, 50, 8), DropoutKey(k), torch.zeros(1)) for k in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 0.2
    assert 0.08 < first.std() < 0.1


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"steps": 0}, {"noise": 0.0}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SiftSection(**wrong)


@pytest.mark.parametrize("key", ["entry", "norm", "step_size", "radius", "divergence", "regression"])
def test_a_key_of_old_is_refused_with_what_decides_it_now(key, tmp_path):
    (tmp_path / "old.toml").write_text(f"[sift]\nweight = 5.0\n{key} = 0.1\n")
    for preset, overrides in ((tmp_path / "old.toml", []), ("finetune_sift", [f"sift.{key}=0.1"])):
        with pytest.raises(ConfigError, match=rf"sift\.{key} in .* is no key any more: sift\.variant decides it"):
            load_config(preset, overrides, FinetuneConfig)
