"""The plan: every place it names is there, and sequence parallelism leaves alone what is no sequence."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.plan import LAYER_PLAN, SLICED_LAYER_PLAN, SLICED_MODEL_PLAN, divide_vocabulary, plan_of
from deberta_xl.settings.architecture import DebertaConfig

SIZES = {"vocab_size": 60, "num_layers": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64}


def model(**options: object) -> MaskedLanguageModel:
    """A small one with a convolution."""
    return MaskedLanguageModel(DebertaConfig(conv_kernel_size=3, position_buckets=8, **SIZES, **options))


def test_every_place_of_the_tables_is_in_the_model():
    whole = model(share_att_key=False)
    plan = plan_of(whole, sequence_parallel=True)
    assert plan.keys() >= {f"encoder.layers.2.{place}" for place in LAYER_PLAN}
    assert plan.keys() >= SLICED_MODEL_PLAN.keys()
    assert plan.keys() >= {f"encoder.layers.0.{place}" for place in SLICED_LAYER_PLAN}
    assert plan.keys() <= dict(whole.named_modules()).keys()


@pytest.mark.parametrize(("position_biased_input", "num_sliced"), [(False, 2), (True, 3)])
def test_the_layer_that_emd_applies_works_on_the_whole_sequence(position_biased_input, num_sliced):
    divided = model(position_biased_input=position_biased_input)
    plan = plan_of(divided, sequence_parallel=True)
    entries = [plan[f"encoder.layers.{number}.attention.entry"] for number in range(3)]
    assert entries == ["join_apart"] * num_sliced + ["copy"] * (3 - num_sliced)


def test_the_relative_table_takes_the_plain_path():
    plan = plan_of(model(), sequence_parallel=True)
    assert {style for name, style in plan.items() if name.endswith("relative_entry")} == {"copy"}
    assert not any("relative_position" in name or "relative_dropout" in name for name in plan)


def test_a_part_of_which_the_model_has_no_module_is_named():
    whole = model()
    del whole.encoder.layers[2]
    with pytest.raises(ConfigError, match=r"tells of 'encoder.layers.2.*weight', but the model has no module"):
        plan_of(whole, sequence_parallel=False)


def test_a_prediction_of_ones_own_is_not_replaced_by_that_of_a_divided_vocabulary():
    class Own(MaskedLanguageModel):
        def predict(self, *given, **options):
            return super().predict(*given, **options)

    with torch.device("meta"):
        own = Own(model().config)
    groups = Groups(Grid(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match=r"Own predicts in a way of its own.*tensor_parallel_size=2"):
        divide_vocabulary(own, groups)
