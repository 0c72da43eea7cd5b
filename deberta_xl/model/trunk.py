"""The trunk of every model: embeddings, and the encoder with its relative table.

Shape suffixes of this file:
    B batch   S sequence   D hidden   R relative rows (2k)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels.registry import Demand, choose_kernel, load_kernel
from deberta_xl.model.dropout import DropoutKey, fold_key
from deberta_xl.model.embeddings import Embeddings
from deberta_xl.model.encoder import Encoder, recompute
from deberta_xl.model.initialization import initialize_weights
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.parts import Part, Shape, trunk_parts, with_heads
from deberta_xl.model.scene import Scene, read_mask
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.mask import Mask
from deberta_xl.settings.platform import Platform

Perturb = Callable[[Tensor], Tensor]
"""Changes the summed embeddings [B, S, D] before they are normalised."""


def shapes_of_model(model: nn.Module) -> dict[str, Shape]:
    """Name -> shape of every parameter of what has been built."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class Trunk(nn.Module):
    """Embeddings and encoder. A model is a trunk with something on it:

        class Sentiment(Trunk):
            def __init__(self, config, seed=0):
                with torch.device("meta"):  # allocated and drawn below
                    super().__init__(config)
                    self.classifier = nn.Linear(config.hidden_size, 2)
                self.draw_weights(seed)

            def forward(self, input_ids, attention_mask=None, *, dropout_key=None):
                scene = self.scene(input_ids, attention_mask, dropout_key)
                return self.classifier(self.encode(input_ids, scene)[:, 0])

    It inherits, so that `embeddings.…` and `encoder.…` are the names of its parameters, as in every checkpoint. What is
    not of the trunk is computed alike on every rank that shares its layers (tensor and sequence parallelism). The word
    table is divided over those: a head that reads it, too, is that of `MaskedLanguageModel`, from which to inherit.
    """

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.prediction_entry = nn.Identity()
        """Before the head; where ranks divide the sequence, the plan puts in its place what joins the slices."""

    @property
    def num_ordinary_layers(self) -> int:
        """Layers that run as they are, 0 … n−1: all of them, unless a model applies the last in a way of its own."""
        return self.config.num_layers

    @property
    def encoder_layers(self) -> dict[str, EncoderLayer]:
        """By their names, the layers that a kernel computes attention in and that ranks divide: the encoder's. A model
        may have others; a head's own are not divided."""
        return {f"encoder.layers.{number}": layer for number, layer in enumerate(self.encoder.layers)}

    def describe(self) -> list[Part]:
        """The anatomy as far as it is told beforehand; a model with a head may add its part."""
        return trunk_parts(self.config)

    @property
    def parts(self) -> list[Part]:
        """The anatomy of what has been built. Raises ConfigError for a parameter that has been forgotten there."""
        return with_heads(self.describe(), shapes_of_model(self))

    def draw_weights(self, seed: int) -> None:
        """Allocate and draw every parameter, as a function of (seed, name).

        Called last by a model's `__init__`, which may build its modules on the meta device. Where the caller has chosen
        that device for the model (`with torch.device("meta")`), nothing is allocated or drawn. Buffers keep their
        values. Raises ConfigError for one that has none, since it was made on the meta device.
        """
        device = torch.get_default_device()
        if device.type == "meta":
            return
        buffers = dict(self.named_buffers())
        if lost := [name for name, buffer in buffers.items() if buffer.is_meta]:
            raise ConfigError(
                f"{type(self).__name__} makes {', '.join(lost)} on the meta device, where a buffer has no values: make "
                'it behind the block of torch.device("meta")'
            )
        self.to_empty(device=device)
        for name, values in buffers.items():
            self.get_buffer(name).copy_(values)
        initialize_weights(self, self.config.initializer_range, seed)

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.encoder.apply_layer = recompute

    def use_kernel(self, name: str, mask: Mask = "bidirectional", platform: Platform | None = None) -> str:
        """Compute attention with a kernel: one of `kernels/registry.py`, or `auto`. Returns its name.

        It stays when weights move; without a call of this, attention is `auto`'s wherever they are. `platform` is what
        will be computed on; what the weights are on when absent.

        Raises ConfigError when the name is unknown, or the kernel does not support the model under such a mask there.
        """
        layers = self.encoder_layers.values()
        platform = platform or next((layer.attention.platform for layer in layers), None) or Platform()
        chosen = choose_kernel(name, Demand(self.config, mask, platform))
        attend = load_kernel(chosen)
        for layer in layers:
            layer.attention.attend, layer.attention.is_chosen = attend, True
        return chosen

    def scene(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        key: DropoutKey | None = None,
        relative_RD: Tensor | None = None,
        open_BS: Tensor | None = None,
    ) -> Scene:
        """What the layers see beside the states.

        Args:
            input_ids: [batch, sequence].
            attention_mask: [batch, sequence], 0 at padding and 1 elsewhere, or the number 1, 2, … of the document each
                token belongs to: documents of one row do not see each other. Or [batch, query, key], used as it is.
                All ones when absent.
            key: names the dropout masks; torch's global generator draws them when absent.
            relative_RD: the relative table as an earlier stage saw it; computed here when absent.
            open_BS: [batch, sequence], bool: which tokens are seen from everywhere in their document, the others only
                from themselves on. All False makes the model causal, True in the prefix of each document a prefix
                language model. Without it every token is seen from everywhere.
        """
        if relative_RD is None:
            relative_RD = self.encoder.relative_position()
        where = read_mask(input_ids, attention_mask, self.encoder.relative_position.buckets, open_BS)
        return Scene(where, relative_RD, key)

    def embed(
        self,
        input_ids: Tensor,
        scene: Scene,
        token_type_ids: Tensor | None = None,
        perturb: Perturb | None = None,
    ) -> Tensor:
        """The embeddings, which layer 0 reads, [B, S, D]; where ranks divide the sequence, this rank's slice."""
        return self.embeddings(input_ids, scene.segments_BS, token_type_ids, fold_key(scene.key, "embeddings"), perturb)

    def encode(
        self,
        input_ids: Tensor,
        scene: Scene,
        token_type_ids: Tensor | None = None,
        perturb: Perturb | None = None,
    ) -> Tensor:
        """The states after the ordinary layers, which a head reads, [B, S, D]: the whole sequence on every rank."""
        embedded_BSD = self.embed(input_ids, scene, token_type_ids, perturb)
        (hidden_BSD,) = self.encoder(embedded_BSD, scene, numbers=range(self.num_ordinary_layers))
        return self.prediction_entry(hidden_BSD)
