"""The model of a run is made once: drawn where the run is new, only allocated where a checkpoint has its weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.model import trunk
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.objectives.objective import KeepsBest, Mean, Objective, Ratio
from deberta_xl.objectives.pretraining import Pretraining
from deberta_xl.parallel.grid import Grid
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.training.assembly import build_model, check_told
from deberta_xl.training.start import check_divisible_model

CONFIG = DebertaConfig(
    vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
    max_position_embeddings=24,
)  # fmt: skip


class Small:
    """As much of an objective as building asks for."""

    def __init__(self, model: type[nn.Module] = MaskedLanguageModel):
        self.model, self.loaded = model, []

    def build(self) -> nn.Module:
        """The model."""
        return self.model(CONFIG, 3)

    def load_initial(self, model: nn.Module) -> None:
        """Notes what it was given."""
        self.loaded.append(model)


class WithBuffer(MaskedLanguageModel):
    """A model that holds more than parameters."""

    def __init__(self, config: DebertaConfig, seed: int):
        super().__init__(config, seed)
        self.register_buffer("scale", torch.full((1,), 7.0), persistent=False)


class WithTensor(MaskedLanguageModel):
    """A model one of whose attributes is a tensor."""

    def __init__(self, config: DebertaConfig, seed: int):
        super().__init__(config, seed)
        self.scale = torch.full((1,), 7.0)


def test_a_new_run_draws_its_weights_and_may_read_others():
    objective = Small()
    model = build_model(objective, None, is_new=True)
    assert objective.loaded == [model]
    for name, parameter in MaskedLanguageModel(CONFIG, 3).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_resumed_run_draws_and_reads_nothing(monkeypatch):
    monkeypatch.setattr(trunk, "initialize_weights", lambda *_: pytest.fail("weights are drawn to be overwritten"))
    objective = Small()
    model = build_model(objective, None, is_new=False)
    assert objective.loaded == []
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MaskedLanguageModel(CONFIG).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("model", [WithBuffer, WithTensor])
def test_what_no_checkpoint_holds_is_made_as_ever(model):
    assert build_model(Small(model), None, is_new=False).scale.item() == 7.0


def told(kind: type[Objective] = Objective, **changes: object) -> Objective:
    """What an objective of a kind says of itself, with nothing behind it."""
    reports = {"loss": Mean("labels"), "accuracy": Ratio("labels")}
    said = {"counts": ("labels",), "reports": reports, "has_held_out": False} | changes
    return type("Told", (kind,), {**dict.fromkeys(kind.__abstractmethods__), **said})()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (told(KeepsBest), r"keeps the best weights .* set data\.valid"),
        (told(reports={"accuracy": Ratio("labels")}), "reports has accuracy, but no loss, which is differentiated"),
        (told(reports={"loss": Mean("label")}), "reports divides loss by label, but counts has only labels"),
    ],
)
def test_an_objective_that_contradicts_itself_is_refused(objective, words):
    check_told(told())
    check_told(told(KeepsBest, has_held_out=True))
    with pytest.raises(ConfigError, match=words):
        check_told(objective)


def test_only_a_trunk_can_be_divided_or_begin_with_other_weights():
    halves = Grid(tensor_parallel_size=2)
    encoder = MaskedLanguageModel(CONFIG, 3)
    check_divisible_model(nn.ModuleList([encoder]), [encoder], halves)
    check_divisible_model(nn.Linear(2, 2), [], Grid())
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 divides a Trunk .*, and Linear neither is nor has"):
        check_divisible_model(nn.Linear(2, 2), [], halves)
    objective = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(init="runs/first")))
    with pytest.raises(ConfigError, match=r"train\.init has the weights of a Trunk .*, and Linear is none"):
        Pretraining.load_initial(objective, nn.Linear(2, 2))
