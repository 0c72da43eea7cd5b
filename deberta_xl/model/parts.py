"""The anatomy of the models, told once, as data: their parts, and the parameters, place, work and bytes of each.

Whoever has to know a model from outside loops over its parts: shapes and counts, what tensor parallelism divides, which
pipeline stage has what, rates by depth, operations, memory. A new parameter is a line in one of the functions below; a
new module is a part. A model with a head of its own adds the head's part to `trunk_parts`, or leaves it out: then
`with_heads` reads its shapes from the built model, and whoever counts says that its work and bytes are not counted.

Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, NoReturn

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.part_costs import (
    Activations,
    Division,
    Load,
    convolution_flops,
    decoder_layer_activations,
    decoder_layer_flops,
    head_positions,
    layer_activations,
    layer_flops,
    linear_flops,
    no_bytes,
    no_work,
    shared_decoder_activations,
    shared_decoder_flops,
    vocabulary_activations,
    vocabulary_flops,
)
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig

Shape = tuple[int, ...]
Cut = Literal["column", "row", "vocabulary"]
"""How tensor-parallel ranks divide a parameter: by outputs, by inputs, by rows of the vocabulary."""
CUT_DIMENSION: dict[Cut, int] = {"column": 0, "row": 1, "vocabulary": 0}


class Parameter(NamedTuple):
    """One tensor of weights."""

    shape: Shape
    cut: Cut | None = None
    """How it is divided; None where every tensor-parallel rank has all of it."""

    def numel(self, tensor_parallel_size: int = 1) -> int:
        """Elements on one tensor-parallel rank, padding of the vocabulary included."""
        lengths = list(self.shape)
        if self.cut is not None:
            dimension = CUT_DIMENSION[self.cut]
            lengths[dimension] = -(-lengths[dimension] // tensor_parallel_size)
        return math.prod(lengths)


class Part(NamedTuple):
    """A piece of a model that stays together."""

    name: str
    """What the names of its parameters begin with."""
    parameters: Mapping[str, Parameter]
    """By the rest of their names."""
    units: tuple[int, ...]
    """The units of the model that use it, ascending; its work and bytes are the last one's. Unit 0 is the embeddings,
    units 1 … N are the layers (the convolution belongs to the first of them), and unit N has the heads, too. A pipeline
    stage has neighbouring units."""
    layers_above: int
    """How far below the head it stands: 0 in a head, 1 in the last layer, N + 1 in the embeddings."""
    flops: Callable[[Load], float] | None
    """Operations of a forward pass. None: not known."""
    activations: Callable[[Load, Division], Activations] | None
    """Bytes of a forward pass. None: not known."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Canonical name and parameter."""
        for rest, parameter in self.parameters.items():
            yield f"{self.name}.{rest}" if rest else self.name, parameter


# What models are made of.


def masked_lm_parts(config: DebertaConfig) -> list[Part]:
    """`MaskedLanguageModel(config)`: the head shares the word table, and EMD takes the last layer's place, or has some
    layers of its own."""
    last = config.num_layers
    *trunk, top = trunk_parts(config)
    trunk = [part._replace(units=(0, last)) if part.name == "embeddings.word" else part for part in trunk]
    if config.shares_last_layer:
        flops, activations = partial(shared_decoder_flops, config), partial(shared_decoder_activations, config)
        top = top._replace(flops=flops, activations=activations)
    flops, activations = partial(decoder_layer_flops, config), partial(decoder_layer_activations, config)
    decoder = [
        Part(f"decoder.layers.{n}", layer_parameters(config), (last,), 0, flops, activations)
        for n in range(config.num_own_decoder_layers)
    ]
    width = config.embedding_width
    parameters = {
        **linear("dense", config.hidden_size, width),
        **norm("norm", width),
        "bias": Parameter((config.vocab_size,), "vocabulary"),
    }
    head = Part(
        "head", parameters, (last,), 0, partial(vocabulary_flops, config), partial(vocabulary_activations, config)
    )
    return [*trunk, top, *decoder, head]


def task_parts(config: DebertaConfig, head: HeadConfig) -> list[Part]:
    """`TaskModel(config, head)`: without the absolute positions that only EMD reads."""
    trunk = trunk_parts(config)
    if config.decodes_positions:
        trunk = [part for part in trunk if part.name != "embeddings.position"]
    last, hidden = config.num_layers, config.hidden_size
    positions = partial(head_positions, head)
    heads = {"pooler.dense": hidden} if head.is_pooled else {}
    heads["classifier"] = head.num_labels
    return trunk + [
        Part(name, linear("", hidden, outputs), (last,), 0, partial(linear_flops, hidden, outputs, positions), no_bytes)
        for name, outputs in heads.items()
    ]


def discriminator_parts(config: DebertaConfig, sharing: str) -> list[Part]:
    """`Discriminator(config, sharing)`: of tables it has what its input embeddings read and no generator lends."""
    hidden, last, tables = config.hidden_size, config.num_layers, ("embeddings.word", "embeddings.position")
    unread = () if config.position_biased_input else tables[1:]
    trunk = [part for part in trunk_parts(config) if part.name not in (tables if sharing == "es" else unread)]
    if sharing == "gdes":
        trunk = [part._replace(name=f"{part.name}_delta") if part.name in tables else part for part in trunk]
    parameters = {**norm("norm", hidden), **linear("dense", hidden, hidden), **linear("classifier", hidden, 1)}
    flops = partial(linear_flops, hidden, hidden + 1, lambda load: load.tokens)
    return [*trunk, Part("detector", parameters, (last,), 0, flops, no_bytes)]


def replaced_tokens_parts(discriminator: DebertaConfig, generator: DebertaConfig, sharing: str) -> list[Part]:
    """`ReplacedTokenModel`: the discriminator's units follow the generator's."""
    first = [part._replace(name=f"generator.{part.name}") for part in masked_lm_parts(generator)]
    offset = generator.num_layers + 1
    return first + [
        part._replace(name=f"discriminator.{part.name}", units=tuple(offset + unit for unit in part.units))
        for part in discriminator_parts(discriminator, sharing)
    ]


def trunk_parts(config: DebertaConfig) -> list[Part]:
    """What all models share: embeddings, relative table, convolution, and the layers as they are, in order."""
    hidden, width, layers = config.hidden_size, config.embedding_width, config.num_layers
    # Where it is no input, the enhanced mask decoder adds absolute positions.
    position_unit = 0 if config.position_biased_input else layers
    position = {"weight": Parameter((config.max_position_embeddings, width))}
    is_read = config.position_biased_input or config.decodes_positions
    relative = {"table.weight": Parameter((config.relative_rows, hidden))}
    if config.normalize_relative_table:
        relative |= norm("norm", hidden)
    parts = [
        table("embeddings.word", {"weight": Parameter((config.vocab_size, width), "vocabulary")}, config),
        *([table("embeddings.position", position, config)._replace(units=(position_unit,))] if is_read else []),
        table("embeddings", embedding_parameters(config), config),
        *([table("encoder.relative_position", relative, config)] if config.relative_rows else []),
    ]
    if config.conv_kernel_size:
        flops = partial(convolution_flops, config)
        parts.append(Part("encoder.convolution", convolution_parameters(config), (1,), layers, flops, no_bytes))
    flops, activations = partial(layer_flops, config), partial(layer_activations, config)
    return parts + [
        Part(f"encoder.layers.{n}", layer_parameters(config), (n + 1,), layers - n, flops, activations)
        for n in range(layers)
    ]


def table(name: str, parameters: Mapping[str, Parameter], config: DebertaConfig) -> Part:
    """What the embeddings look up or project: no work that counts."""
    return Part(name, parameters, (0,), config.num_layers + 1, no_work, no_bytes)


def embedding_parameters(config: DebertaConfig) -> dict[str, Parameter]:
    """What the input embeddings have besides words and positions."""
    hidden, width = config.hidden_size, config.embedding_width
    parameters = norm("norm", hidden)
    if config.type_vocab_size:
        parameters["token_type.weight"] = Parameter((config.type_vocab_size, width))
    if width != hidden:
        parameters["projection.weight"] = Parameter((hidden, width))
    return parameters


def convolution_parameters(config: DebertaConfig) -> dict[str, Parameter]:
    """The n-gram convolution's."""
    hidden = config.hidden_size
    weight = Parameter((hidden, hidden // config.conv_groups, config.conv_kernel_size))
    return {"weight": weight, "bias": Parameter((hidden,)), **norm("norm", hidden)}


def layer_parameters(config: DebertaConfig) -> dict[str, Parameter]:
    """One encoder layer's. Heads are divided, so each rank has the projections of its own, positions' included."""
    hidden, inner, width = config.hidden_size, config.attention_size, config.intermediate_size
    projections = ["query_proj", "key_proj", "value_proj"]
    if not config.share_att_key:
        projections += ["pos_key_proj"] * config.has_content_to_position
        projections += ["pos_query_proj"] * config.has_position_to_content
    parameters: dict[str, Parameter] = {}
    for projection in projections:
        parameters |= linear(f"attention.{projection}", hidden, inner, "column")
    return {
        **parameters,
        **linear("attention.out_proj", inner, hidden, "row"),
        **norm("attention_norm", hidden),
        **linear("feed_forward.up", hidden, width, "column"),
        **linear("feed_forward.down", width, hidden, "row"),
        **norm("feed_forward_norm", hidden),
    }


def linear(name: str, inputs: int, outputs: int, cut: Cut | None = None) -> dict[str, Parameter]:
    """A projection with bias; ranks that divide its inputs all have the whole bias."""
    start = f"{name}." if name else ""
    bias = Parameter((outputs,), None if cut == "row" else cut)
    return {f"{start}weight": Parameter((outputs, inputs), cut), f"{start}bias": bias}


def norm(name: str, width: int) -> dict[str, Parameter]:
    """A LayerNorm."""
    return {f"{name}.weight": Parameter((width,)), f"{name}.bias": Parameter((width,))}


# What follows from parts.


def parameters_of(parts: Iterable[Part]) -> dict[str, Parameter]:
    """Canonical name -> parameter, of the whole model."""
    return dict(named for part in parts for named in part.named_parameters())


def shapes_of(parts: Iterable[Part]) -> dict[str, Shape]:
    """Canonical name -> shape of every parameter, of the whole model."""
    return {name: parameter.shape for name, parameter in parameters_of(parts).items()}


def num_parameters(parts: Iterable[Part], tensor_parallel_size: int = 1) -> int:
    """Elements of all parameters on one tensor-parallel rank."""
    return sum(parameter.numel(tensor_parallel_size) for part in parts for parameter in part.parameters.values())


def unit_flops(parts: Sequence[Part], load: Load) -> list[float]:
    """Operations of a forward pass by unit of the model, as far as parts tell them."""
    units = [0.0] * (1 + max(part.units[-1] for part in parts))
    for part in parts:
        if part.flops is not None:
            units[part.units[-1]] += part.flops(load)
    return units


def forward_flops(parts: Sequence[Part], load: Load) -> float:
    """Operations of a forward pass, as far as parts tell them."""
    return sum(unit_flops(parts, load))


def uncounted(parts: Iterable[Part]) -> list[str]:
    """The parts whose operations or bytes are not known, by name."""
    return [part.name for part in parts if part.flops is None or part.activations is None]


def parts_by_parameter(parts: Sequence[Part], names: Iterable[str]) -> dict[str, Part]:
    """The part of each parameter of a built model. Raises ConfigError for a name that is in none."""
    found = {name: part for part in parts for name, _ in part.named_parameters()}
    return {name: found[name] if name in found else refuse(name) for name in names}


def refuse(name: str) -> NoReturn:
    """A parameter whose module is described, but not it. Raises ConfigError."""
    raise ConfigError(
        f"no part of the model has a parameter {name!r}: add it in deberta_xl/model/parts.py (for a head of your own, "
        "in its part) to the parameters of its module"
    )


def with_heads(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> list[Part]:
    """The parts of a built model, and one for each head that they leave out: whole on every rank, its costs unknown.

    `shapes` are those of the model's parameters. Without parts, every module is a head. Raises ConfigError, with the
    name, for a parameter that is in no part, although its module (embeddings, encoder, a head that has a part) is.
    """
    known, modules = parameters_of(parts), {part.name.partition(".")[0] for part in parts}
    heads: dict[str, dict[str, Parameter]] = {}
    for name, shape in shapes.items():
        module, _, rest = name.partition(".")
        if name in known:
            continue
        if module in modules:
            refuse(name)
        heads.setdefault(module, {})[rest] = Parameter(shape)
    last = max((part.units[-1] for part in parts), default=0)
    return [*parts, *(Part(name, parameters, (last,), 0, None, None) for name, parameters in heads.items())]
