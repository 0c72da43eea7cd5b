"""The architecture of a model: what of it can be chosen, and what follows from that."""

from __future__ import annotations

from typing import Literal

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import at_least, at_most, divisors, frozen, positive, probability

Activation = Literal["gelu", "gelu_tanh", "relu", "tanh", "silu"]
"""`gelu` is the exact, erf form; `gelu_tanh` its approximation, `gelu_new` and `gelu_fast` of transformers."""
HeadKind = Literal["classification", "regression", "multi_label", "token", "span", "choice"]

PAD_ID = 0
"""Id of [PAD], in every tokenizer and every word table."""
IGNORED = -100
"""Label of a token that has none: in no loss and no metric."""
MOST_LAYERS = 10_000
"""Each is planned and built one by one, so that a slip of some zeros would keep a start busy for ever."""
RELEASED_PASSES = 2
"""How often the released models' enhanced mask decoder applies the last layer."""


@frozen
class DebertaConfig:
    """The architecture: arXiv 2006.03654, section 3, as the original release computes it (microsoft/DeBERTa:
    DeBERTa/deberta/{config,bert,disentangled_attention}.py, DeBERTa/apps/models/masked_language_model.py).

    The defaults are DeBERTa-v2's layout: log buckets, position projections shared with the content's,
    a normalised relative table, absolute positions only in the enhanced mask decoder.
    """

    vocab_size: int
    """Rows of the word table, spare ids included."""
    hidden_size: int = 768
    """Width of the residual stream (H)."""
    num_layers: int = 12
    """Encoder layers (N). A decoder of shared weights takes the place of the last one."""
    num_heads: int = 12
    """Attention heads."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_heads when unset."""
    intermediate_size: int = 3072
    """Inner width of the feed-forward block."""
    embedding_size: int | None = None
    """Width of the embedding tables; hidden_size when unset, otherwise projected to it."""
    max_position_embeddings: int = 512
    """Rows of the absolute-position table: the longest sequence."""
    max_relative_positions: int | None = None
    """Farthest distance told apart; max_position_embeddings when unset."""
    position_buckets: int = 256
    """Logarithmic buckets on each side of the relative table (k); 0 gives every distance its own row (v1)."""
    bucket_rule: Literal["original", "transformers"] = "original"
    """How distances fall into buckets. In sequences longer than max_relative_positions, `original` puts those beyond it
    into the last bucket; `transformers` reads row 0 of the table for them, which shorter sequences never train."""
    pos_att_type: Literal["c2p", "p2c", "c2p|p2c", "none"] = "c2p|p2c"
    """Position terms of eq. (4): content-to-position, position-to-content, both, or content alone: then there is no
    relative table, and what is said of its rows has no effect."""
    share_att_key: bool = True
    """Project the relative table with the content's query and key projections (v2, v3) instead of its own (v1)."""
    normalize_relative_table: bool = True
    """LayerNorm on the relative table (v2, v3)."""
    position_biased_input: bool = False
    """Add absolute positions to the input, as BERT does; there is no enhanced mask decoder then."""
    decoder_passes: int | None = None
    """Layers of the enhanced mask decoder (the paper's n), each applied to what the one before it gives; 0 leaves the
    decoder out: prediction then reads the last encoder layer. When unset 2, or 0 with position_biased_input."""
    decoder_weights: Literal["shared", "own"] = "shared"
    """The decoder's layers: the encoder's last one, as often as there are passes, or layers of its own behind all of
    the encoder's."""
    decoder_input: Literal["positions", "states"] = "positions"
    """What the decoder's queries begin as: the states it attends to with absolute positions added, or those states
    alone. One pass over them is BERT's decoding: with shared weights, the plain encoder."""
    type_vocab_size: int = 0
    """Rows of the token-type table; 0 leaves it out."""
    conv_kernel_size: int = 0
    """Width (odd) of the n-gram convolution beside the first layer; 0 leaves it out."""
    conv_groups: int = 1
    """Groups of the n-gram convolution."""
    conv_act: Activation = "gelu"
    """Activation after the n-gram convolution."""
    hidden_act: Activation = "gelu"
    """Activation of the feed-forward block and of the head."""
    hidden_dropout: float = 0.1
    """Dropout on embeddings, the relative table and every sublayer's output."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    layer_norm_eps: float = 1e-7
    """Added to the variance inside every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""

    def __post_init__(self) -> None:
        at_least(1, hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads)
        at_most(MOST_LAYERS, num_layers=self.num_layers, decoder_passes=self.decoder_passes)
        at_least(1, intermediate_size=self.intermediate_size, vocab_size=self.vocab_size)
        at_least(1, head_dim=self.head_dim, embedding_size=self.embedding_size)
        at_least(2, max_position_embeddings=self.max_position_embeddings)
        at_least(2, max_relative_positions=self.max_relative_positions)
        at_least(0, position_buckets=self.position_buckets, type_vocab_size=self.type_vocab_size)
        probability("hidden_dropout", self.hidden_dropout)
        probability("attention_dropout", self.attention_dropout)
        # A row of zeros (padding) would be NaN after a LayerNorm without epsilon.
        positive(layer_norm_eps=self.layer_norm_eps, initializer_range=self.initializer_range)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                f"choose one of {divisors(self.hidden_size)} or set head_dim"
            )
        self._check_decoder()
        if self.embedding_width != self.hidden_size and self.decodes_positions:
            raise ConfigError(
                f"embedding_size={self.embedding_size} differs from hidden_size={self.hidden_size}, but the enhanced "
                "mask decoder adds position vectors to hidden states; leave embedding_size unset"
            )
        if self.conv_kernel_size < 0 or (self.conv_kernel_size and self.conv_kernel_size % 2 == 0):
            raise ConfigError(f"conv_kernel_size={self.conv_kernel_size} must be odd, or 0 for no convolution")
        if self.conv_groups < 1 or self.hidden_size % self.conv_groups:
            raise ConfigError(f"conv_groups={self.conv_groups} does not divide hidden_size={self.hidden_size}")
        if self.position_buckets and not 2 <= self.position_buckets < 2 * self.relative_reach:
            raise ConfigError(
                f"position_buckets={self.position_buckets} must lie in 2 … {2 * self.relative_reach - 1} "
                f"(below twice max_relative_positions={self.relative_reach}), or be 0 for no buckets"
            )

    def _check_decoder(self) -> None:
        """Raise ConfigError for a decoder that contradicts the rest."""
        at_least(0, decoder_passes=self.decoder_passes)
        if self.position_biased_input and self.decoder_passes:
            raise ConfigError(
                f"decoder_passes={self.decoder_passes} with position_biased_input=true: with absolute positions in the "
                "input there is no decoder; leave decoder_passes unset, or position_biased_input=false"
            )
        if not self.num_decoder_passes:
            for name, value, default in (
                ("decoder_weights", self.decoder_weights, "shared"), ("decoder_input", self.decoder_input, "positions"),
            ):  # fmt: skip
                if value != default:
                    raise ConfigError(
                        f"{name}={value}, but there is no decoder (decoder_passes={self.decoder_passes}, "
                        f"position_biased_input={str(self.position_biased_input).lower()}); leave {name} unset, or set "
                        "decoder_passes to 1 or more"
                    )
        if self.num_layers < 2 and self.shares_last_layer:
            raise ConfigError(
                f"num_layers={self.num_layers}: the enhanced mask decoder reads the layer before the last; take 2 or "
                "more, or decoder_passes=0"
            )

    @property
    def num_decoder_passes(self) -> int:
        """Layers that the enhanced mask decoder applies; 0 without one."""
        if self.decoder_passes is None:
            return 0 if self.position_biased_input else RELEASED_PASSES
        return self.decoder_passes

    @property
    def num_own_decoder_layers(self) -> int:
        """Layers of the decoder's own weights."""
        return self.num_decoder_passes if self.decoder_weights == "own" else 0

    @property
    def shares_last_layer(self) -> bool:
        """Whether the decoder takes the place of the encoder's last layer."""
        return self.num_decoder_passes > 0 and self.decoder_weights == "shared"

    @property
    def decodes_positions(self) -> bool:
        """Whether the decoder's queries have absolute positions in them."""
        return self.num_decoder_passes > 0 and self.decoder_input == "positions"

    @property
    def has_released_decoder(self) -> bool:
        """Whether prediction is that of the released models: two passes of the last layer over absolute positions, or
        none with positions in the input."""
        is_plain = (self.decoder_weights, self.decoder_input) == ("shared", "positions")
        return is_plain and self.num_decoder_passes == (0 if self.position_biased_input else RELEASED_PASSES)

    @property
    def predicts_from_last_state(self) -> bool:
        """Whether prediction reads what the encoder gives when all its layers run as they are."""
        is_plain_layer = self.shares_last_layer and not self.decodes_positions and self.num_decoder_passes == 1
        return is_plain_layer or not self.num_decoder_passes

    @property
    def head_size(self) -> int:
        """Width of one head (d of the scale 1/sqrt(3d))."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size

    @property
    def embedding_width(self) -> int:
        """Width of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def relative_reach(self) -> int:
        """Farthest distance told apart, plus one (M of eq. 3's clamp)."""
        return self.max_relative_positions or self.max_position_embeddings

    @property
    def relative_span(self) -> int:
        """Rows of the relative table on each side (k of eq. 3)."""
        return self.position_buckets or self.relative_reach

    @property
    def has_content_to_position(self) -> bool:
        """Whether the second term of eq. (4) is used."""
        return "c2p" in self.pos_att_type

    @property
    def has_position_to_content(self) -> bool:
        """Whether the third term of eq. (4) is used."""
        return "p2c" in self.pos_att_type

    @property
    def relative_rows(self) -> int:
        """Rows of the relative table (2k); 0 where no term reads one."""
        return 2 * self.relative_span if self.has_content_to_position or self.has_position_to_content else 0


@frozen
class HeadConfig:
    """What a fine-tuned model computes from the encoder's states."""

    kind: HeadKind
    """`classification`, `regression` and `multi_label` read [CLS]; `choice` scores options by their [CLS]; `token`
    labels every token; `span` points at a first and a last one."""
    num_labels: int = 1
    """Classes; 1 for regression and choice, 2 (first and last) for spans."""
    dropout: float = 0.1
    """Before the last projection."""
    pooler_act: Activation = "gelu"
    """Behind the projection of [CLS], where the head reads that."""
    pooler_dropout: float = 0.0
    """Before the projection of [CLS]."""

    def __post_init__(self) -> None:
        at_least(1, num_labels=self.num_labels)
        probability("dropout", self.dropout)
        probability("pooler_dropout", self.pooler_dropout)
        fixed = {"regression": 1, "choice": 1, "span": 2}.get(self.kind, self.num_labels)
        if self.num_labels != fixed:
            raise ConfigError(f"num_labels={self.num_labels}: a head of kind {self.kind!r} has {fixed}")

    @property
    def is_pooled(self) -> bool:
        """Whether the head reads [CLS] alone."""
        return self.kind not in ("token", "span")
