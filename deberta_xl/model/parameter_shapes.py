"""Names and shapes of the model's parameters, by arithmetic: without torch, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from deberta_xl.architecture import DebertaConfig, HeadConfig

Shape = tuple[int, ...]


def parameter_shapes(config: DebertaConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every parameter of `MaskedLanguageModel(config)`."""
    layer = dict(layer_shapes(config))
    shapes = dict(embedding_shapes(config))
    for number in range(config.num_layers):
        shapes |= {f"encoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | dict(head_shapes(config))


def task_parameter_shapes(config: DebertaConfig, head: HeadConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every parameter of `TaskModel(config, head)`."""
    left_out = ("head.",) if config.position_biased_input else ("head.", "embeddings.position.")
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if not name.startswith(left_out)}
    if head.is_pooled:
        shapes |= dict(linear("pooler.dense", config.hidden_size, config.hidden_size))
    return shapes | dict(linear("classifier", config.hidden_size, head.num_labels))


def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    """A projection with bias."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    """A LayerNorm."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def embedding_shapes(config: DebertaConfig) -> Iterator[tuple[str, Shape]]:
    """Tables and what stands beside the layers: input embeddings, relative table, n-gram convolution."""
    hidden, width = config.hidden_size, config.embedding_width
    yield "embeddings.word.weight", (config.vocab_size, width)
    yield "embeddings.position.weight", (config.max_position_embeddings, width)
    if config.type_vocab_size:
        yield "embeddings.token_type.weight", (config.type_vocab_size, width)
    if width != hidden:
        yield "embeddings.projection.weight", (hidden, width)
    yield from norm("embeddings.norm", hidden)
    yield "encoder.relative_position.table.weight", (2 * config.relative_span, hidden)
    if config.normalize_relative_table:
        yield from norm("encoder.relative_position.norm", hidden)
    if config.conv_kernel_size:
        yield "encoder.convolution.weight", (hidden, hidden // config.conv_groups, config.conv_kernel_size)
        yield "encoder.convolution.bias", (hidden,)
        yield from norm("encoder.convolution.norm", hidden)


def layer_shapes(config: DebertaConfig) -> Iterator[tuple[str, Shape]]:
    """One encoder layer."""
    hidden, inner = config.hidden_size, config.attention_size
    for kind in ("query", "key", "value"):
        yield from linear(f"attention.{kind}_proj", hidden, inner)
    if not config.share_att_key:
        yield from linear("attention.pos_key_proj", hidden, inner)
        if config.has_position_to_content:
            yield from linear("attention.pos_query_proj", hidden, inner)
    yield from linear("attention.out_proj", inner, hidden)
    yield from norm("attention_norm", hidden)
    yield from linear("feed_forward.up", hidden, config.intermediate_size)
    yield from linear("feed_forward.down", config.intermediate_size, hidden)
    yield from norm("feed_forward_norm", hidden)


def head_shapes(config: DebertaConfig) -> Iterator[tuple[str, Shape]]:
    """The masked-LM head; its table is the word table."""
    yield from linear("head.dense", config.hidden_size, config.embedding_width)
    yield from norm("head.norm", config.embedding_width)
    yield "head.bias", (config.vocab_size,)
