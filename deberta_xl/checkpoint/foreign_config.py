"""Configuration fields at the border: ours, and those of the original release and of Hugging Face's `deberta-v2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deberta_xl.architecture import DebertaConfig
from deberta_xl.errors import ConfigError

#: Fields that differ in name only.
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

#: What the original release assumes where a field is absent, and we assume differently.
ABSENT = {"conv_act": "tanh", "position_buckets": 0, "position_biased_input": True, "share_att_key": False}

#: Values below 1 that mean "unset" there.
UNSET_BELOW_ONE = ("max_relative_positions", "embedding_size", "head_dim")


def from_foreign_config(fields: Mapping[str, Any]) -> DebertaConfig:
    """The architecture described by a released `config.json` or `model_config.json`.

    Raises ConfigError for what cannot be a DeBERTa of ours: no relative attention, or unknown position terms.
    """
    if not fields.get("relative_attention", False):
        raise ConfigError("config.json says relative_attention=false: that is a BERT, not a DeBERTa")
    values = dict(ABSENT)
    values |= {ours: fields[theirs] for ours, theirs in RENAMED.items() if fields.get(theirs) is not None}
    for name in UNSET_BELOW_ONE:
        if isinstance(values.get(name), int) and values[name] < 1:
            del values[name]
    if isinstance(values["position_buckets"], int) and values["position_buckets"] < 0:
        values["position_buckets"] = 0
    values["pos_att_type"] = position_terms(fields.get("pos_att_type", "none"))
    values["normalize_relative_table"] = "layer_norm" in str(fields.get("norm_rel_ebd", "none")).lower()
    return DebertaConfig(**values)


def position_terms(value: str | list[str]) -> str:
    """`pos_att_type` in our spelling, from "p2c|c2p" or ["p2c", "c2p"]."""
    listed = value.lower().split("|") if isinstance(value, str) else value
    terms = set(map(str, listed)) if isinstance(listed, list) else set()
    if terms == {"c2p"}:
        return "c2p"
    if terms == {"c2p", "p2c"}:
        return "c2p|p2c"
    raise ConfigError(f"pos_att_type={value!r} is not supported; known: 'c2p' and 'c2p|p2c'")


#: Fields that the functions below compute from the architecture, besides RENAMED.
COMPUTED = ("relative_attention", "pos_att_type", "norm_rel_ebd", "padding_idx", "pad_token_id", "model_type", "legacy")
#: Fields that describe a file, not a model, and are written anew; or that point to programs, and are never passed on.
OF_THE_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")


def other_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a released configuration says beyond the architecture (pooling, labels, …): kept for the way back."""
    known = {*RENAMED.values(), *COMPUTED, *OF_THE_FILE}
    return {name: value for name, value in fields.items() if name not in known}


def to_microsoft_config(config: DebertaConfig) -> dict[str, Any]:
    """Fields of the original release's `model_config.json`."""
    fields = {theirs: getattr(config, ours) for ours, theirs in RENAMED.items()}
    return {name: value for name, value in fields.items() if value is not None} | {
        "relative_attention": True,
        "attention_head_size": config.head_size,
        "max_relative_positions": config.max_relative_positions or -1,
        "position_buckets": config.position_buckets or -1,
        "pos_att_type": config.pos_att_type,
        "norm_rel_ebd": "layer_norm" if config.normalize_relative_table else "none",
        "padding_idx": 0,
    }


def to_huggingface_config(config: DebertaConfig, *, is_fused: bool = False, is_legacy: bool = False) -> dict[str, Any]:
    """Fields of a config.json that `transformers` loads; our own absolute positions and EMD ride along.

    `is_fused` writes `deberta` (v1's attention) instead of `deberta-v2`; `is_legacy` its older masked-LM head.
    """
    fields = to_microsoft_config(config) | {
        "model_type": "deberta" if is_fused else "deberta-v2",
        "architectures": ["DebertaForMaskedLM" if is_fused else "DebertaV2ForMaskedLM"],
        "pos_att_type": config.pos_att_type.split("|"),
        "pad_token_id": 0,
        "legacy": is_legacy,
        "pooler_hidden_size": config.hidden_size,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
    }
    v2_only = ("share_att_key", "position_buckets", "norm_rel_ebd", "attention_head_size") if is_fused else ()
    return {name: value for name, value in fields.items() if name not in v2_only}
