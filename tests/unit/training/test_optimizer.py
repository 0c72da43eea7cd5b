"""AdamW's groups, and the original's form of Adam."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.task_model import TaskModel
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.settings.finetuning import FinetuneOptimizerSection
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training import optimizer as module
from deberta_xl.training.optimizer import PlainAdam, build_optimizer, parameter_groups

SECTION = OptimizerSection(learning_rate=0.01, weight_decay=0.1, bias_correction=False)


def test_norms_and_biases_do_not_decay_and_everything_else_does():
    config = DebertaConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
        conv_kernel_size=3,
    )  # fmt: skip
    model = MaskedLanguageModel(config)
    decayed, free = ({id(p) for p in group["params"]} for group in parameter_groups(model, SECTION))
    for name, parameter in model.named_parameters():
        is_free = "norm" in name or name.endswith("bias")
        assert (id(parameter) in free) == is_free, name
        assert (id(parameter) in decayed) != is_free, name


def test_a_parameter_of_no_learner_is_refused_by_name():
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "second": torch.nn.Linear(2, 2)})
    groups = parameter_groups(model, SECTION, {"first": 1.0, "second": 0.5})
    assert [(group["learner"], group["rate_share"]) for group in groups] == [
        ("first", 1.0), ("first", 1.0), ("second", 0.5), ("second", 0.5),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"second.weight belongs to none of the objective's learners \(first\)"):
        parameter_groups(model, SECTION, {"first": 1.0})


def test_without_bias_correction_an_update_is_the_originals_formula():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, SECTION)
    assert isinstance(optimizer, PlainAdam)
    weight, m, v = model.weight.detach().clone(), torch.zeros(2, 3), torch.zeros(2, 3)
    for _ in range(3):
        gradient = torch.randn(2, 3, generator=generator)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2)
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        weight = weight - 0.01 * (m / (v.sqrt() + 1e-6) + 0.1 * weight)
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-6, atol=1e-7)
    assert optimizer.state[model.weight]["step"] == 3


def test_a_long_parameter_is_updated_in_parts_as_if_in_one(monkeypatch):
    updates = []
    for elements in (10**6, 64):
        monkeypatch.setattr(module, "PART_ELEMENTS", elements)
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(1000, generator=generator))
        optimizer = PlainAdam([parameter], lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
        for _ in range(3):
            parameter.grad = torch.randn(1000, generator=generator)
            optimizer.step()
        updates.append([parameter.detach(), *optimizer.state[parameter].values()])
    assert all(map(torch.equal, *updates))


def test_a_parameter_without_a_gradient_is_left_alone():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    build_optimizer(model, SECTION).step()
    assert torch.equal(model.weight, before)


def test_each_layer_learns_at_its_share_of_the_rate_of_the_layer_above():
    config = DebertaConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
        conv_kernel_size=3,
    )  # fmt: skip
    model = TaskModel(config, HeadConfig(kind="classification", num_labels=2))
    section = FinetuneOptimizerSection(layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(model, section)
    share = {id(p): group["rate_share"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = {
        "classifier.weight": 1, "pooler.dense.bias": 1, "encoder.layers.1.feed_forward.up.weight": 0.5,
        "encoder.layers.0.attention_norm.weight": 0.25, "encoder.convolution.weight": 0.25,
        "embeddings.word.weight": 0.125, "encoder.relative_position.table.weight": 0.125,
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    assert {name: share[id(parameters[name])] for name in expected} == expected
    assert len(share) == len(parameters)
    assert all(decay[id(p)] == (0.1 if p.dim() >= 2 else 0.0) for p in parameters.values())
