"""Configuration fields at the border: ours, and those of the original release and of Hugging Face's `deberta-v2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.architecture import Activation, DebertaConfig
from deberta_xl.weights.foreign_fields import DECODER, RENAMED, refuse_unknown

#: Names of activations there, and ours; of those of one function, the first is the one written.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "swish": "silu",
    "silu": "silu",
}

#: What the original release assumes where a field is absent, and we assume differently.
ABSENT = {"conv_act": "tanh", "position_buckets": 0, "position_biased_input": True, "share_att_key": False}

#: Values below 1 that mean "unset" there.
UNSET_BELOW_ONE = ("max_relative_positions", "embedding_size", "head_dim")


#: What transformers assumes where its configuration of v2 and v3 says nothing, and the original and we do otherwise.
ABSENT_IN_V2 = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_layers": 24,
    "num_heads": 24,
    "intermediate_size": 6144,
}

#: What v1 does not have. transformers' class for it ignores these fields, the original does not.
NOT_IN_V1 = {
    "position_buckets": lambda value: value > 0,
    "share_att_key": bool,
    "conv_kernel_size": lambda value: value > 0,
    "norm_rel_ebd": lambda value: str(value).strip().lower() != "none",
}


def from_foreign_config(fields: Mapping[str, Any]) -> DebertaConfig:
    """The architecture described by a released `config.json` or `model_config.json`.

    Raises ConfigError for what cannot be a DeBERTa of ours, such as unknown position terms, and for every field that
    says what we do not compute.
    """
    terms = position_terms(fields)
    refuse_unknown(fields)
    refuse_v1_with_parts_of_v2(fields)
    values = ABSENT | (ABSENT_IN_V2 if fields.get("model_type") == "deberta-v2" else {})
    there = RENAMED | {name: name for name in DECODER}
    values |= {ours: fields[theirs] for ours, theirs in there.items() if fields.get(theirs) is not None}
    for name in UNSET_BELOW_ONE:
        if isinstance(values.get(name), int) and values[name] < 1:
            del values[name]
    if isinstance(values["position_buckets"], int) and values["position_buckets"] < 0:
        values["position_buckets"] = 0
    if not values.get("conv_kernel_size") and values["conv_act"] not in ACTIVATION_NAMES:
        values["conv_act"] = ABSENT["conv_act"]  # of no effect, whatever it is
    for name in ("hidden_act", "conv_act"):
        if name in values:
            values[name] = activation(name, values[name])
    values["pos_att_type"] = terms
    values["normalize_relative_table"] = has_normalized_table(fields.get("norm_rel_ebd"))
    values["bucket_rule"] = bucket_rule(fields)
    return DebertaConfig(**values)


def refuse_v1_with_parts_of_v2(fields: Mapping[str, Any]) -> None:
    """Raise ConfigError when a configuration of v1 asks for what only v2 has: its two readers disagree."""
    if fields.get("model_type") != "deberta":
        return
    for name, is_asked_for in NOT_IN_V1.items():
        if fields.get(name) is not None and is_asked_for(fields[name]):
            raise ConfigError(
                f"{name}={fields[name]!r}, but model_type='deberta' (v1) has no such thing: transformers would leave "
                "it out; say model_type='deberta-v2', or delete the field"
            )


def activation(name: str, value: Any) -> Activation:
    """Ours for the activation that the field `name` asks for."""
    if value not in ACTIVATION_NAMES:
        raise ConfigError(f"{name}={value!r} is not supported; known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[value]


def activation_there(ours: Activation) -> str:
    """The name of an activation that transformers reads; the original reads it, too, save for `gelu_new`."""
    return next(theirs for theirs, name in ACTIVATION_NAMES.items() if name == ours)


def has_normalized_table(value: Any) -> bool:
    """What `norm_rel_ebd` says."""
    terms = {term.strip() for term in str("none" if value is None else value).lower().split("|")}
    if terms - {"none", "layer_norm", ""}:
        raise ConfigError(f"norm_rel_ebd={value!r} is not supported; known: 'none' and 'layer_norm'")
    return "layer_norm" in terms


def bucket_rule(fields: Mapping[str, Any]) -> str:
    """How distances fall into buckets.

    What transformers has saved was trained, or last checked, with its rule, whatever it had been read from. Microsoft's
    releases, on the Hub too, were trained by the original code, never beyond their reach, and say no version of
    transformers: they keep the original's rule, which stays at trained rows.
    """
    is_saved_by_transformers = bool(fields.get("model_type") and fields.get("transformers_version"))
    has_buckets = isinstance(buckets := fields.get("position_buckets"), int) and buckets > 0
    if is_saved_by_transformers and has_buckets:
        return "transformers"
    return fields.get("bucket_rule") or "original"


def position_terms(fields: Mapping[str, Any]) -> str:
    """`pos_att_type` in our spelling, from "p2c|c2p" or ["p2c", "c2p"]; none where there is no relative attention."""
    is_relative, value = fields.get("relative_attention", False), fields.get("pos_att_type")
    listed = [term.strip() for term in value.lower().split("|")] if isinstance(value, str) else value or []
    # A term named twice would count twice in transformers' scale of v1, and once in that of v2.
    named = sorted(map(str, listed)) if isinstance(listed, list) else [str(listed)]
    terms = "|".join(term for term in named if term not in ("", "none"))
    is_stated = value is not None or fields.get("model_type")
    if is_relative not in (True, False) or not (is_relative or is_stated):
        raise ConfigError(
            f"relative_attention={is_relative!r}, and no true: that is a BERT, not a DeBERTa; one of content alone "
            "says pos_att_type='none' as well"
        )
    if not is_stated:
        raise ConfigError("pos_att_type is absent: versions of the original read that as 'c2p' or 'none'; say which")
    if terms not in ("c2p", "p2c", "c2p|p2c", ""):
        raise ConfigError(f"pos_att_type={value!r} is not supported; known: 'c2p', 'p2c', 'c2p|p2c' and 'none'")
    if terms and not is_relative:
        raise ConfigError(
            f"relative_attention={is_relative!r}, but pos_att_type={value!r}: there the scale counts terms that are "
            "not computed; say pos_att_type='none' for content alone, or relative_attention=true"
        )
    return terms or "none"


def to_microsoft_config(config: DebertaConfig) -> dict[str, Any]:
    """Fields of the original release's `model_config.json`."""
    fields = {theirs: getattr(config, ours) for ours, theirs in RENAMED.items()}
    return {name: value for name, value in fields.items() if value is not None} | {
        "relative_attention": config.relative_rows > 0,
        "attention_head_size": config.head_size,
        "max_relative_positions": config.max_relative_positions or -1,
        "position_buckets": config.position_buckets or -1,
        "pos_att_type": config.pos_att_type,
        # Without relative attention transformers would make a norm of it that nothing reads.
        "norm_rel_ebd": "layer_norm" if config.normalize_relative_table and config.relative_rows else "none",
        "hidden_act": activation_there(config.hidden_act),
        "conv_act": activation_there(config.conv_act),
        "bucket_rule": config.bucket_rule,
        "padding_idx": 0,
    }


def to_huggingface_config(config: DebertaConfig, *, is_fused: bool = False, is_legacy: bool = False) -> dict[str, Any]:
    """Fields of a config.json that `transformers` loads; our own absolute positions and EMD ride along, and what says
    how it decodes, unless it is as released.

    `is_fused` writes `deberta` (v1's attention) instead of `deberta-v2`; `is_legacy` its older masked-LM head.
    """
    fields = to_microsoft_config(config) | {
        "model_type": "deberta" if is_fused else "deberta-v2",
        "architectures": ["DebertaForMaskedLM" if is_fused else "DebertaV2ForMaskedLM"],
        "pos_att_type": config.pos_att_type.split("|") if config.relative_rows else [],
        "pad_token_id": 0,
        "legacy": is_legacy,
        "pooler_hidden_size": config.hidden_size,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
    }
    if not config.has_released_decoder:
        fields |= {name: getattr(config, name) for name in DECODER if getattr(config, name) is not None}
    v2_only = ("share_att_key", "position_buckets", "norm_rel_ebd", "attention_head_size") if is_fused else ()
    return {name: value for name, value in fields.items() if name not in v2_only}
