"""Parameter names at the border: ours, and those of the original release (which Hugging Face keeps).

Inside the package a parameter has one name, that of the plain model (`MaskedLanguageModel.named_parameters()`).

A head besides the masked-LM head is converted both ways once its modules have a line each in HEADS; its tensors then
stand under our names in `model.safetensors`. Tensors of other known heads (RIDERS) are carried along under their own
names behind "extra.", so nothing is lost. `dialect.py` has what differs between releases beyond names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The modules of a layer that have weights.
LAYER_PLACES = (
    *(f"attention.{kind}_proj" for kind in ("query", "key", "value", "pos_key", "pos_query", "out")),
    *("attention_norm", "feed_forward.up", "feed_forward.down", "feed_forward_norm"),
)
#: Ours and theirs; `#` stands for a layer's number. Whatever follows (weight, bias) is the same on both sides.
#: A decoder's own layers nobody else has: they are carried along, and found again, under our names.
PREFIXES = {
    "embeddings.word": "deberta.embeddings.word_embeddings",
    "embeddings.position": "deberta.embeddings.position_embeddings",
    "embeddings.token_type": "deberta.embeddings.token_type_embeddings",
    "embeddings.projection": "deberta.embeddings.embed_proj",
    "embeddings.norm": "deberta.embeddings.LayerNorm",
    "encoder.relative_position.table": "deberta.encoder.rel_embeddings",
    "encoder.relative_position.norm": "deberta.encoder.LayerNorm",
    "encoder.convolution.norm": "deberta.encoder.conv.LayerNorm",
    "encoder.convolution": "deberta.encoder.conv.conv",
    "encoder.layers.#.attention.query_proj": "deberta.encoder.layer.#.attention.self.query_proj",
    "encoder.layers.#.attention.key_proj": "deberta.encoder.layer.#.attention.self.key_proj",
    "encoder.layers.#.attention.value_proj": "deberta.encoder.layer.#.attention.self.value_proj",
    "encoder.layers.#.attention.pos_key_proj": "deberta.encoder.layer.#.attention.self.pos_key_proj",
    "encoder.layers.#.attention.pos_query_proj": "deberta.encoder.layer.#.attention.self.pos_query_proj",
    "encoder.layers.#.attention.out_proj": "deberta.encoder.layer.#.attention.output.dense",
    "encoder.layers.#.attention_norm": "deberta.encoder.layer.#.attention.output.LayerNorm",
    "encoder.layers.#.feed_forward.up": "deberta.encoder.layer.#.intermediate.dense",
    "encoder.layers.#.feed_forward.down": "deberta.encoder.layer.#.output.dense",
    "encoder.layers.#.feed_forward_norm": "deberta.encoder.layer.#.output.LayerNorm",
    **{f"decoder.layers.#.{place}": f"decoder.layers.#.{place}" for place in LAYER_PLACES},
    "head.dense": "lm_predictions.lm_head.dense",
    "head.norm": "lm_predictions.lm_head.LayerNorm",
    "head": "lm_predictions.lm_head",
}

#: Heads besides the masked-LM head, ours and theirs, in the form of PREFIXES.
HEADS: dict[str, str] = {
    "pooler.dense": "pooler.dense",
    "classifier": "classifier",
    "detector.norm": "mask_predictions.LayerNorm",
    "detector.dense": "mask_predictions.dense",
    "detector.classifier": "mask_predictions.classifier",
}
DETECTOR = "detector.classifier.weight"
"""Who has it is a discriminator: it tells which tokens of a text were replaced."""

#: Beginnings of tensors that belong to a DeBERTa but to no parameter of ours: others' heads for tasks.
RIDERS = ("qa_outputs.",)
#: The ending of v3's gradient-disentangled tables: what the discriminator adds to the generator's table of that name.
DELTA = "._weight"
#: Before the original name of a rider among our names.
EXTRA = "extra."


def translate(name: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    """`name` with its prefix exchanged by the first pair that fits, or None."""
    for source, target in prefixes:
        pattern = re.escape(source).replace(r"\#", r"(\d+)") + r"\.(weight|bias)"
        if match := re.fullmatch(pattern, name):
            *layer, kind = match.groups()
            return (target.replace("#", layer[0]) if layer else target) + f".{kind}"
    return None


def to_microsoft(name: str) -> str:
    """Our name -> the original release's."""
    translated = translate(name, (PREFIXES | HEADS).items())
    if translated is None:
        raise KeyError(f"no name of the original release is known for parameter {name!r}")
    return translated


def from_microsoft(name: str) -> str | None:
    """The original release's name -> ours; None for tensors that are no parameters of the model."""
    return translate(name, ((theirs, ours) for ours, theirs in (PREFIXES | HEADS).items()))


def is_rider(name: str) -> bool:
    """Whether a tensor of the original release is carried along without being a parameter of ours."""
    return name.startswith(RIDERS) or name.endswith(DELTA)


def is_beside_the_model(name: str) -> bool:
    """Whether a name of ours is that of a rider, or of a head that the masked-LM model does not have."""
    return name.startswith(EXTRA) or translate(name, HEADS.items()) is not None
