"""The anatomy told by arithmetic is that of the models that are built."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import (
    Part,
    Shape,
    forward_flops,
    linear,
    num_parameters,
    parts_by_parameter,
    shapes_of,
    task_parts,
    uncounted,
    unit_flops,
)
from deberta_xl.model.task_model import TaskModel
from deberta_xl.model.trunk import Trunk
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig, HeadKind
from deberta_xl.settings.presets import load_run_config, preset_names

UNEVEN = {"vocab_size": 97, "hidden_size": 24, "num_layers": 3, "num_heads": 3, "intermediate_size": 40}
VARIANTS = [
    {},
    {"conv_kernel_size": 3, "conv_groups": 2},
    {"share_att_key": False, "pos_att_type": "c2p", "normalize_relative_table": False, "position_buckets": 0},
    {"share_att_key": False, "type_vocab_size": 2},
    {"share_att_key": False, "pos_att_type": "p2c"},
    {"share_att_key": False, "pos_att_type": "none"},
    {"position_biased_input": True, "embedding_size": 16, "head_dim": 5},
]
HEADS = {"classification": 3, "regression": 1, "multi_label": 4, "token": 9, "span": 2, "choice": 1}


def built_shapes(model: nn.Module) -> dict[str, Shape]:
    """Those of the real model."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_has_the_shape_that_its_part_tells(changes):
    config = DebertaConfig(**UNEVEN | changes)
    with torch.device("meta"):
        models = [
            MaskedLanguageModel(config),
            *(TaskModel(config, HeadConfig(kind=k, num_labels=n)) for k, n in HEADS.items()),
        ]
    for model in models:
        assert shapes_of(model.describe()) == built_shapes(model)
        assert len(model.parts) == len(model.describe())


@pytest.mark.parametrize("preset", preset_names())
def test_the_presets_too(preset):
    config = load_run_config(preset).model.architecture(128_001)
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
    assert shapes_of(model.describe()) == built_shapes(model)


def test_a_parameter_that_nobody_told_of_is_refused_with_the_file_to_add_it_to():
    model = MaskedLanguageModel(DebertaConfig(**UNEVEN))
    for name in ("encoder.layers.1.feed_forward.scale", "head.scale"):
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_parameter(child, nn.Parameter(torch.ones(3)))
        with pytest.raises(ConfigError, match=rf"{name}.*deberta_xl/model/parts.py"):
            _ = model.parts
        with pytest.raises(ConfigError, match=rf"{name}.*deberta_xl/model/parts.py"):
            parts_by_parameter(model.describe(), [name])
        model.get_submodule(parent).register_parameter(child, None)


class Tagger(Trunk):
    """Somebody's model, of whose head nothing is told."""

    def __init__(self, config: DebertaConfig):
        with torch.device("meta"):
            super().__init__(config)
            self.tagger = nn.Linear(config.hidden_size, 5)


class ToldTagger(Tagger):
    """The same, with the head's part."""

    def describe(self) -> list[Part]:
        last, width = self.config.num_layers, self.config.hidden_size
        head = Part("tagger", linear("", width, 5), (last,), 0, lambda load: 2 * load.tokens * width * 5, None)
        return [*super().describe(), head]


def test_a_head_of_ones_own_is_read_from_the_model_where_its_part_is_not_told():
    untold, told = Tagger(DebertaConfig(**UNEVEN)), ToldTagger(DebertaConfig(**UNEVEN))
    load = Load(2, 10)
    for model in (untold, told):
        assert shapes_of(model.parts) == built_shapes(model)
        assert num_parameters(model.parts) == sum(p.numel() for p in model.parameters())
        assert parts_by_parameter(model.parts, ["tagger.bias"])["tagger.bias"].layers_above == 0
        assert uncounted(model.parts) == ["tagger"]
    assert forward_flops(told.parts, load) - forward_flops(untold.parts, load) == 2 * 20 * 24 * 5


@pytest.mark.parametrize("kind", HEADS)
def test_a_tasks_head_reads_every_token_or_the_first(kind: HeadKind):
    config, head = DebertaConfig(**UNEVEN), HeadConfig(kind=kind, num_labels=HEADS[kind])
    layers, load = config.num_layers, Load(4, 10)
    *_, before, last = unit_flops(task_parts(config, head), load)
    pooled = 2 * 4 * 24 * (24 + HEADS[kind])
    assert last - before == (2 * 40 * 24 * HEADS[kind] if kind in ("token", "span") else pooled)
    assert len(unit_flops(task_parts(config, head), load)) == layers + 1


def test_no_torch_is_needed():
    code = "import sys, deberta_xl.model.parts, deberta_xl.planning.outlook; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
