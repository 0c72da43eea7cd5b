"""What the fields of a released configuration mean for us: computed with, harmless, or refused by name.

| field | |
|---|---|
| RENAMED, COMPUTED and OF_A_HEAD | computed with |
| HARMLESS, CONDITIONS with the value there, and all that is unset, 0, false, none or empty | change nothing |
| REASONS, and any other whose name speaks of a part of the model | refused: we do not compute it |
| any other (an author, a licence, a learning rate) | informational, kept |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deberta_xl.base.errors import ConfigError

#: Fields that differ from ours in name only.
RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_size",
    "intermediate_size": "intermediate_size",
    "embedding_size": "embedding_size",
    "max_position_embeddings": "max_position_embeddings",
    "max_relative_positions": "max_relative_positions",
    "position_buckets": "position_buckets",
    "share_att_key": "share_att_key",
    "position_biased_input": "position_biased_input",
    "type_vocab_size": "type_vocab_size",
    "conv_kernel_size": "conv_kernel_size",
    "conv_groups": "conv_groups",
    "conv_act": "conv_act",
    "hidden_act": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
#: Fields of ours that others do not read, of the decoder where it is not the released models'.
DECODER = ("decoder_passes", "decoder_weights", "decoder_input")
#: … and of how a model was trained (`Learnt`): ours, and what they are called there. The length is not taken from a
#: tokenizer's model_max_length, which may be any at which somebody wanted texts cut.
LEARNT = {"objective": "writing_objective", "form": "writing_form", "sequence_length": "trained_sequence_length"}
#: Fields that are computed from the architecture in another way, and written anew.
COMPUTED = (
    "relative_attention",
    "pos_att_type",
    "norm_rel_ebd",
    "padding_idx",
    "pad_token_id",
    "model_type",
    "legacy",
    "bucket_rule",
    "embedding_sharing",
    *DECODER,
    *LEARNT.values(),
)
#: What a task's head is computed with (`foreign_heads.py`); an encoder alone carries it along.
OF_A_HEAD = ("pooling", "pooler_hidden_act", "pooler_dropout", "pooler_hidden_size", "cls_dropout", "problem_type")
#: Fields that describe a file, not a model, and are written anew; or that point to programs, and are never passed on.
OF_THE_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")
#: Fields of transformers' that its DeBERTa never reads, or that change no output.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "add_cross_attention",
    "attn_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "id2label",
    "is_decoder",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "tie_encoder_decoder",
    "z_steps",
}
#: Fields that change nothing with these values.
CONDITIONS: dict[str, tuple[Any, ...]] = {
    "pad_token_id": (0, None),
    "padding_idx": (0, None),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True, None),
}
REASONS = {
    "pad_token_id": "ids of ours begin with 0 = [PAD]",
    "padding_idx": "ids of ours begin with 0 = [PAD]",
    "quantization_config": "its weights are quantised; load it with the library that did so, and save it in float32",
    "talking_head": "no released DeBERTa mixes its heads, and ours cannot",
    "tie_word_embeddings": "DeBERTa predicts through its word table",
}
#: Words in a field's name that speak of what is computed …
OF_THE_MODEL = re.compile(
    "act|activation|adapter|alibi|att|attention|attn|bias|buckets?|conv|convolution|dense|depth|dim|dropout|ebd|embed|"
    "embeddings?|eps|epsilon|experts?|ffn|gated?|glu|heads?|hidden|intermediate|kernel|kv|layers?|layernorm|lora|mlp|"
    "moe|norms?|peft|pool|pooler|pooling|position|positional|positions|pruned|qkv?|quantization|rel|relative|residual|"
    "rope|rotary|scale|scaling|shared?|softcap|softmax|sparse|sparsity|talking|tied?|vocab|width|window"
)
#: … unless another says that it is of how a model was trained, is tokenised, or generates.
OF_THE_TRAINING = re.compile(
    "batch|data|datasets?|decay|epochs?|eval|finetuning|freeze|frozen|generation|learning|loss|lr|metrics?|optimizer|"
    "seed|steps|summary|tasks?|token|tokenizer|train|training|wandb|warmup"
)
IDLE_WORDS = ("", "none", "null", "false")


def refuse_unknown(fields: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first field that says what we do not compute."""
    known = {*RENAMED.values(), *COMPUTED, *OF_A_HEAD, *OF_THE_FILE, *HARMLESS} - CONDITIONS.keys()
    for name, value in fields.items():
        if name in known or value in CONDITIONS.get(name, ()):
            continue
        if name in CONDITIONS:
            is_computed = name != "tie_word_embeddings" or predicts_by_a_table_of_its_own(fields)
        else:
            is_computed = not is_idle(value) and (name in REASONS or speaks_of_the_model(name))
        if is_computed:
            reason = REASONS.get(name, "no DeBERTa of ours has such a part; if it changes no output, delete the field")
            raise ConfigError(f"{name}={shortened(value)} is not supported: {reason}")


def predicts_by_a_table_of_its_own(fields: Mapping[str, Any]) -> bool:
    """Whether `tie_word_embeddings` would matter: only to transformers' older masked-LM head."""
    return "MaskedLM" in str(fields.get("architectures")) and fields.get("legacy", True)


def is_idle(value: Any) -> bool:
    """Whether a value switches off whatever its field is about."""
    if isinstance(value, str):
        return value.strip().lower() in IDLE_WORDS
    return value is None or value in (0, -1) or (isinstance(value, list | dict) and not value)


def speaks_of_the_model(name: str) -> bool:
    """Whether a field's name is that of a part of the model."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return any(map(OF_THE_MODEL.fullmatch, words)) and not any(map(OF_THE_TRAINING.fullmatch, words))


def shortened(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def other_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a released configuration says beyond the architecture (pooling, labels, …): kept for the way back."""
    known = {*RENAMED.values(), *COMPUTED, *OF_THE_FILE}
    return {name: value for name, value in fields.items() if name not in known}
