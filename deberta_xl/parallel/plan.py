"""The plan of tensor and sequence parallelism: what in the plain model is divided over ranks, and how.

The model does not know. Heads are divided: each rank holds the content and relative projections of its own heads, so
all three terms of eq. (4) stay on a rank. One sum of gradients where states enter the heads serves query, key and value
at once, a second one the relative table; in the forward pass one sum follows the output projection, one the
feed-forward block.

Sequence parallelism leaves to each rank a slice of the sequence from the embeddings to the states that prediction
reads. There the whole sequence is joined again, and the enhanced mask decoder works on it as without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.parts import parameters_of
from deberta_xl.parallel.grid import check_divisible

if TYPE_CHECKING:  # the tables are read before torch is imported
    from torch import nn

    from deberta_xl.model.masked_lm import MaskedLanguageModel
    from deberta_xl.model.trunk import Trunk
    from deberta_xl.parallel.groups import Groups

#: Modules without weights of each layer of `Trunk.encoder_layers`, and what takes their place; a head may have layers
#: of its own, which are not divided. `model/parts.py` has what divides weights.
LAYER_PLAN = {
    "attention.entry": "copy",
    "attention.relative_entry": "copy",
    "feed_forward.entry": "copy",
}

#: What sequence parallelism changes in the layers that work on slices: all but the one that EMD applies.
#: The relative table and its dropout are no sequence, and stay as they are.
SLICED_LAYER_PLAN = {
    "attention.entry": "join_apart",
    "attention.out_proj": "row_to_slice",
    "attention_norm": "add_norm_of_slice",
    "feed_forward.entry": "join_apart",
    "feed_forward.down": "row_to_slice",
    "feed_forward_norm": "add_norm_of_slice",
}

#: … and around them.
SLICED_MODEL_PLAN = {
    "embeddings.exit": "slice",
    "encoder.convolution.entry": "join_alike",
    "encoder.convolution.exit": "slice",
    "encoder.convolution.norm": "norm_of_slice",
    "prediction_entry": "join_alike",
}


def plan_of(model: Trunk, *, sequence_parallel: bool) -> dict[str, str]:
    """Name of each module of `model` that is replaced -> what takes its place. Raises ConfigError for one it lacks."""
    names = [name for name, _ in model.named_modules()]
    plan = planned_layers(model.encoder_layers, LAYER_PLAN)
    for name, parameter in parameters_of(model.parts).items():
        module, _, kind = name.rpartition(".")
        if parameter.cut is not None and kind == "weight":
            if module not in names:
                raise ConfigError(f"a part tells of {name!r}, but the model has no module {module!r}; mend `describe`")
            plan[module] = parameter.cut
    if sequence_parallel:
        ordinary = [f"encoder.layers.{number}" for number in range(model.num_ordinary_layers)]
        sliced = SLICED_MODEL_PLAN | planned_layers(ordinary, SLICED_LAYER_PLAN)
        plan |= {name: style for name, style in sliced.items() if name in names}
    return plan


def planned_layers(layers: Iterable[str], plan: Mapping[str, str]) -> dict[str, str]:
    """A layer's plan, for layers of these names."""
    return {f"{layer}.{place}": plan[place] for layer in layers for place in plan}


def divide(model: nn.Module, groups: Groups, *, sequence_parallel: bool = False) -> None:
    """Replace, in place, what the plan names by this rank's slice of it, in every trunk of `model`, usually itself.

    Parameters keep their names. With `sequence_parallel` the states between embeddings and prediction are this rank's
    slice [B, S/T, D]; everything else that travels (the scene, labels) stays whole.
    """
    if groups.grid.tensor_parallel_size == 1:
        return
    from deberta_xl.model.trunk import Trunk

    for trunk in [module for module in model.modules() if isinstance(module, Trunk)]:
        divide_trunk(trunk, groups, sequence_parallel=sequence_parallel)


def divide_trunk(model: Trunk, groups: Groups, *, sequence_parallel: bool) -> None:
    """`divide` for one of them."""
    from deberta_xl.model.masked_lm import MaskedLanguageModel
    from deberta_xl.parallel import layers, sequence  # imports megatron-core, which costs seconds

    size = groups.grid.tensor_parallel_size
    check_divisible(model.config, size)
    builders: dict[str, Callable[[nn.Module], nn.Module]] = {
        "copy": lambda _: layers.CopyToRanks(groups),
        "column": lambda plain: layers.ColumnLinear(plain, groups),
        "row": lambda plain: layers.RowLinear(plain, groups),
        "row_to_slice": lambda plain: layers.RowLinearToSlice(plain, groups),
        "vocabulary": lambda plain: layers.VocabularyEmbedding(plain, groups),
        "join_apart": lambda _: sequence.JoinSequence(groups, apart=True),
        "join_alike": lambda _: sequence.JoinSequence(groups, apart=False),
        "slice": lambda _: sequence.TakeSlice(groups),
        "norm_of_slice": lambda plain: sequence.SliceNorm(plain, groups),
        "add_norm_of_slice": lambda plain: sequence.SliceAddNorm(plain, groups),
    }
    for name, style in plan_of(model, sequence_parallel=sequence_parallel).items():
        plain = model.get_submodule(name)
        if getattr(plain, "weight", plain) is None:
            continue  # another stage's layers have no parameters
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, builders[style](plain).train(plain.training))
    for layer in model.encoder_layers.values():
        layer.attention.first_head = groups.grid.tensor_parallel_rank * (model.config.num_heads // size)
    if isinstance(model, MaskedLanguageModel):
        divide_vocabulary(model, groups)


def divide_vocabulary(model: MaskedLanguageModel, groups: Groups) -> None:
    """The rest of the vocabulary, whose table is divided already: what enters the head, its bias, and what it finds."""
    from torch import nn

    from deberta_xl.model.masked_lm import MaskedLanguageModel

    if type(model).predict is not MaskedLanguageModel.predict:
        raise ConfigError(
            f"{type(model).__name__} predicts in a way of its own (`predict`), which reads whole logits: "
            f"parallel.tensor_parallel_size={groups.grid.tensor_parallel_size} divides the vocabulary; leave it at 1"
        )
    from deberta_xl.parallel import layers

    model.head.entry = layers.CopyToRanks(groups)
    full_bias = model.head.bias
    if full_bias is not None:
        model.head.bias = nn.Parameter(full_bias.new_empty(model.embeddings.word.weight.shape[0]))
        layers.keep_slice(model.head.bias, full_bias, 0, groups)
    model.head.vocabulary = layers.divided_vocabulary(model.config.vocab_size, groups)
