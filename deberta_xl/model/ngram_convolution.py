"""n-gram induced encoding: a convolution over the embeddings, added to the first layer's output (DeBERTa-v2).

Shape suffixes of this file:
    B batch   S sequence   D hidden   W window (kernel size)   G groups   C channels in   O channels out of a group
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deberta_xl.kernels.contract import Where
from deberta_xl.model.dropout import Dropout, DropoutKey
from deberta_xl.model.layer import ACTIVATIONS
from deberta_xl.settings.architecture import DebertaConfig


class NgramConvolution(nn.Module):
    """Convolves within each document: its borders see zeros, as the ends of a sequence do.

    A position sees what attention lets it see: under a causal mask the later half of its window reads zeros, too.
    """

    def __init__(self, config: DebertaConfig):
        super().__init__()
        channels = config.hidden_size // config.conv_groups
        self.groups = config.conv_groups
        self.weight = nn.Parameter(torch.empty(config.hidden_size, channels, config.conv_kernel_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)
        self.activation = ACTIVATIONS[config.conv_act]
        self.entry, self.exit = nn.Identity(), nn.Identity()
        """Around what needs a token's neighbours; where ranks divide the sequence, the plan puts in their places what
        joins the slices, and what takes this rank's slice again."""

    def forward(self, embedded_BSD: Tensor, hidden_BSD: Tensor, where: Where, key: DropoutKey | None = None) -> Tensor:
        """LayerNorm(hidden + activation(dropout(convolution(embedded)))), zero at padding, [B, S, D]."""
        is_token_BS1 = (where.segments_BT > 0).unsqueeze(-1)
        convolved_BSD = self.convolve(self.entry(embedded_BSD), where) * is_token_BS1
        convolved_BSD = self.activation(self.dropout(convolved_BSD, key))
        return self.norm(hidden_BSD + self.exit(convolved_BSD)) * self.exit(is_token_BS1)

    def convolve(self, x_BSD: Tensor, where: Where) -> Tensor:
        """Stride 1, zeros for what is not seen; one matrix product over the window's shifted copies."""
        window = self.weight.shape[-1]
        reach = window // 2
        x_BSWD = F.pad(x_BSD, (0, 0, reach, reach)).unfold(1, window, 1).transpose(-1, -2)
        x_BSWD = x_BSWD * where.sees_neighbours(window).unsqueeze(-1)
        x_BSWGC = x_BSWD.unflatten(-1, (self.groups, -1))
        weight_GOCW = self.weight.unflatten(0, (self.groups, -1))
        return torch.einsum("bswgc,gocw->bsgo", x_BSWGC, weight_GOCW).flatten(-2) + self.bias
