"""One encoder layer: disentangled attention and a feed-forward block, each followed by residual and LayerNorm.

Shape suffixes of this file:
    B batch   S queries   D hidden   N heads on this rank   H head size
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deberta_xl.kernels.add_norm import add_norm
from deberta_xl.kernels.contract import Memory
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.model.disentangled_attention import DisentangledAttention
from deberta_xl.model.dropout import Dropout, fold_key
from deberta_xl.model.scene import Scene
from deberta_xl.settings.architecture import Activation, DebertaConfig

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """Two projections around an activation."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.entry = nn.Identity()
        """As in the attention: where the inner width is divided over ranks, gradients are summed here."""
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down(self.activation(self.up(self.entry(x_BSD))))


class AddNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x)), which ends each half of a layer."""

    def forward(self, x_BSD: Tensor, residual_BSD: Tensor, rule: DropoutRule, row_BS: Tensor | None) -> Tensor:
        """[B, S, D] both -> [B, S, D]; the rule says what of `x` is dropped, whose states have the numbers `row_BS`, or
        are in order."""
        return add_norm(x_BSD, residual_BSD, self.weight, self.bias, self.eps, rule, row_BS)


class EncoderLayer(nn.Module):
    """A post-norm transformer layer with disentangled attention."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.attention = DisentangledAttention(config)
        self.attention_norm = AddNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = AddNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, hidden_BSD: Tensor, scene: Scene) -> Tensor:
        """Every position attends to the sequence it stands in."""
        entered_BSD = self.attention.entry(hidden_BSD)
        query_BNSH, memory = self.attention.ask(entered_BSD), self.attention.memorize(entered_BSD)
        return self.finish(hidden_BSD, query_BNSH, memory, scene)

    def refine(self, source_BSD: Tensor, memory: Memory, scene: Scene) -> Tensor:
        """States of their own attend to a given memory. What the enhanced mask decoder applies."""
        query_BNSH = self.attention.ask(self.attention.entry(source_BSD))
        return self.finish(source_BSD, query_BNSH, memory, scene)

    def finish(self, residual_BSD: Tensor, query_BNSH: Tensor, memory: Memory, scene: Scene) -> Tensor:
        """Attend, and the feed-forward block; each behind dropout, added to what it has read, and normalised."""
        attended_BSD = self.attention(query_BNSH, memory, scene.within("attention"))
        dropout = self.dropout.rule(fold_key(scene.key, "attention_output"))
        u_BSD = self.attention_norm(attended_BSD, residual_BSD, dropout, scene.row_BS)
        dropout = self.dropout.rule(fold_key(scene.key, "feed_forward_output"))
        return self.feed_forward_norm(self.feed_forward(u_BSD), u_BSD, dropout, scene.row_BS)
