"""Multi-head disentangled attention (arXiv 2006.03654, section 3.1): content and relative position, attended apart.

Shape suffixes of this file:
    B batch   S queries (i)   T keys (j)   D hidden   N heads on this rank   H head size   R relative rows (2k)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from deberta_xl.kernels.contract import Attend, Memory, RelativeRows
from deberta_xl.kernels.registry import AUTO, Demand, choose_kernel, load_kernel
from deberta_xl.model.dropout import Dropout, DropoutKey, fold_key
from deberta_xl.model.scene import Scene
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.platform import Platform


class DisentangledAttention(nn.Module):
    """Attention of chosen queries to a memory, with the relative table as a second kind of content."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.config = config
        self.head_size = config.head_size
        self.first_head = 0
        """Number of the first head held here among all heads; where they are divided over ranks, the plan sets it."""
        self.entry = nn.Identity()
        """The states that the heads' projections read pass here, once; where heads are divided over ranks, the plan
        puts in its place what sums the ranks' gradients."""
        self.relative_entry = nn.Identity()
        """The same for the relative table, which is never cut."""
        hidden, inner = config.hidden_size, config.attention_size
        self.query_proj = nn.Linear(hidden, inner)
        self.key_proj = nn.Linear(hidden, inner)
        self.value_proj = nn.Linear(hidden, inner)
        self.out_proj = nn.Linear(inner, hidden)
        self.has_content_to_position = config.has_content_to_position
        self.has_position_to_content = config.has_position_to_content
        self.shares_projections = config.share_att_key
        if not config.share_att_key:
            self.pos_key_proj = nn.Linear(hidden, inner) if config.has_content_to_position else None
            self.pos_query_proj = nn.Linear(hidden, inner) if config.has_position_to_content else None
        self.relative_dropout = Dropout(config.hidden_dropout)
        self.probability_dropout = Dropout(config.attention_dropout)
        """Applied inside the kernel."""
        self.attend: Attend = load_kernel(choose_kernel(AUTO, Demand(config)))
        """How attention is computed (`Trunk.use_kernel`)."""
        self.is_chosen = False
        """Whether somebody has chosen a kernel; else it is `auto`'s, wherever the weights go."""

    def _apply(self, move: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Torch's way of `to`, `double`, `cuda` and the like."""
        super()._apply(move, recurse)
        if not self.is_chosen:
            self.attend = load_kernel(choose_kernel(AUTO, Demand(self.config, platform=self.platform)))
        return self

    @property
    def platform(self) -> Platform:
        """Where the weights are, and what numbers."""
        weight = next(self.parameters(), None)
        if weight is None:  # as in a pipeline, of the layers of other stages
            return Platform()
        return Platform("cuda" if weight.is_cuda else "cpu", weight.element_size())

    def split_heads(self, x: Tensor) -> Tensor:
        """[…, T, N·H] -> […, N, T, H]; N is however many heads the projection holds."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(-3, -2)

    def ask(self, entered_BSD: Tensor) -> Tensor:
        """Queries [B, N, S, H] of states that have passed `entry`."""
        return self.split_heads(self.query_proj(entered_BSD))

    def memorize(self, entered_BTD: Tensor) -> Memory:
        """Keys and values of states that have passed `entry`."""
        return Memory(self.split_heads(self.key_proj(entered_BTD)), self.split_heads(self.value_proj(entered_BTD)))

    def project_positions(
        self, relative_RD: Tensor | None, key: DropoutKey | None = None, read: slice | None = None
    ) -> RelativeRows:
        """The relative table's rows as keys for content-to-position, and as queries for position-to-content; zeros
        instead of rows that are not `read`."""
        if relative_RD is None:
            return RelativeRows()
        relative_RD = self.relative_dropout(relative_RD, fold_key(key, "relative"))
        read = read or slice(0, len(relative_RD))
        beyond = (0, 0, read.start, len(relative_RD) - read.stop)
        relative_RD = self.relative_entry(relative_RD[read] if any(beyond) else relative_RD)
        rows = RelativeRows()
        if self.has_content_to_position:
            to_key = self.key_proj if self.shares_projections else self.pos_key_proj
            rows = rows._replace(key_NRH=self.project_rows(to_key, relative_RD, beyond))
        if self.has_position_to_content:
            to_query = self.query_proj if self.shares_projections else self.pos_query_proj
            rows = rows._replace(query_NRH=self.project_rows(to_query, relative_RD, beyond))
        return rows

    def project_rows(self, projection: nn.Module, read_RD: Tensor, beyond: tuple[int, ...]) -> Tensor:
        """Rows of the table that are read, as the heads have them, [N, R, H], with zeros `beyond` (as of `F.pad`)."""
        rows_NRH = self.split_heads(projection(read_RD))
        return F.pad(rows_NRH, beyond) if any(beyond) else rows_NRH

    def forward(self, query_BNSH: Tensor, memory: Memory, scene: Scene) -> Tensor:
        """The attended and projected context of the scene's queries, [B, S, D]."""
        relative = scene.projected or self.project_positions(scene.relative_RD, scene.key, scene.where.relative_rows)
        dropout = self.probability_dropout.rule(fold_key(scene.key, "probabilities"))
        dropout = dropout._replace(first_head=self.first_head)
        context_BNSH = self.attend(query_BNSH, memory, relative, scene.where, dropout)
        return self.out_proj(context_BNSH.transpose(1, 2).flatten(-2))
