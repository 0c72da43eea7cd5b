"""What another world's DeBERTa cannot hold is refused, what it computes differently is said."""

from __future__ import annotations

import logging

from deberta_xl.base.log import logger
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import Learnt


def check_expressible(config: DebertaConfig) -> None:
    """Refuse what transformers' DeBERTa cannot hold; warn of what it computes differently."""
    refuse_other_width(config, "transformers' DeBERTa-v2 has no such attention")
    if config.embedding_width != config.hidden_size:
        logger.warning(
            "embedding_size=%d differs from hidden_size=%d: AutoModel loads the export, but transformers has no such "
            "masked-LM head for AutoModelForMaskedLM",
            config.embedding_width,
            config.hidden_size,
        )
    warn_of_other_buckets(config, "transformers", "it reads a row of the relative table that is never trained")


def check_expressible_in_the_original(config: DebertaConfig) -> None:
    """Refuse what the original code cannot hold; warn of what it computes differently."""
    refuse_other_width(config, "the original has a square output projection")
    if not config.has_released_decoder:
        raise CheckpointError(
            f"decoder_passes={config.num_decoder_passes}, decoder_weights={config.decoder_weights}, decoder_input="
            f"{config.decoder_input}: the original's code always decodes by two passes of the last layer over absolute "
            "positions; --to huggingface has the encoder as it is, and carries the rest along"
        )
    if config.pos_att_type == "p2c":
        raise CheckpointError(
            "pos_att_type=p2c: the original's code ends with an error at position-to-content without content-to-"
            "position; --to huggingface computes it"
        )
    if "gelu_tanh" in (config.hidden_act, config.conv_act if config.conv_kernel_size else None):
        raise CheckpointError(
            "an activation is gelu_tanh, which the original does not have; it has gelu, relu, tanh, silu"
        )
    if config.relative_reach < config.max_position_embeddings:  # longer sequences than its table it does not take
        warn_of_other_buckets(config, "original", "those beyond it share the last bucket there")


def warn_of_decoder(config: DebertaConfig) -> None:
    """Say where transformers predicts otherwise than a decoder that is not the released models' does."""
    if not (config.has_released_decoder or config.predicts_from_last_state):
        logger.warning(
            "the decoder (decoder_passes=%d, decoder_weights=%s, decoder_input=%s) is carried along, and transformers "
            "leaves it aside: AutoModel is exact, AutoModelForMaskedLM predicts from the encoder's last state",
            config.num_decoder_passes, config.decoder_weights, config.decoder_input,
        )  # fmt: skip


def warn_of_mask(learnt: Learnt, there: str) -> None:
    """Say where a model is computed under another mask than it was trained under: `there` is "transformers attends"."""
    if learnt.objective in ("causal", "prefix"):
        logger.warning(
            "the model was trained with train.objective=%s, and %s to what follows, too: states and predictions are "
            "others there. What it was trained for rides along in its configuration: tools/generate.py reads it",
            learnt.objective, there,
        )  # fmt: skip


def refuse_other_width(config: DebertaConfig, why: str) -> None:
    """Refuse heads that together are not as wide as the states."""
    if config.attention_size != config.hidden_size:
        raise CheckpointError(
            f"{config.num_heads} heads of {config.head_size} make {config.attention_size}, not hidden_size="
            f"{config.hidden_size}: {why}"
        )


def warn_of_other_buckets(config: DebertaConfig, rule_there: str, why: str) -> None:
    """Say from which length on the destination computes something else: where distances fall into other buckets.

    It is worth a warning where our own sequences can be so long.
    """
    reach = config.relative_reach
    if config.position_buckets and config.relative_rows and config.bucket_rule != rule_there:
        logger.log(
            logging.WARNING if reach < config.max_position_embeddings else logging.INFO,
            "the export gives other values for sequences of more than max_relative_positions=%d tokens, from %d on: %s",
            reach,
            reach + 1,
            why,
        )
