"""Input embeddings: words, and where configured token types and absolute positions.

Shape suffixes of this file:
    B batch   S sequence   D hidden   E width of the tables
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.dropout import Dropout, DropoutKey
from deberta_xl.settings.architecture import PAD_ID, DebertaConfig


class Embeddings(nn.Module):
    """Tables and their normalised sum. The absolute-position table lives here where anything reads it; EMD does so
    through `positions`."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        width = config.embedding_width
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=PAD_ID)
        self.position = None
        if config.position_biased_input or config.decodes_positions:
            self.position = nn.Embedding(config.max_position_embeddings, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.projection = nn.Linear(width, config.hidden_size, bias=False) if width != config.hidden_size else None
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)
        self.exit = nn.Identity()
        """The last thing; where ranks divide the sequence, the plan puts in its place what keeps this rank's slice."""
        self.adds_positions = config.position_biased_input
        self.longest = config.max_position_embeddings

    def forward(
        self,
        input_ids_BS: Tensor,
        segments_BS: Tensor,
        token_type_ids_BS: Tensor | None = None,
        key: DropoutKey | None = None,
        perturb: Callable[[Tensor], Tensor] | None = None,
        position_BS: Tensor | None = None,
    ) -> Tensor:
        """Normalised embeddings, zero at padding, [B, S, D]; `perturb` changes their sum before it is normalised.

        `position_BS` says where in their documents the tokens stand, for a sequence that does not begin with the first.
        """
        summed_BSD = self.look_up("word", input_ids_BS)
        if self.adds_positions:
            positions_BSD = (
                self.positions(segments_BS) if position_BS is None else self.look_up("position", position_BS)
            )
            summed_BSD = summed_BSD + positions_BSD
        if self.token_type is not None:
            types_BS = torch.zeros_like(input_ids_BS) if token_type_ids_BS is None else token_type_ids_BS
            summed_BSD = summed_BSD + self.token_type(types_BS)
        if self.projection is not None:
            summed_BSD = self.projection(summed_BSD)
        if perturb is not None:
            summed_BSD = perturb(summed_BSD)
        return self.exit(self.dropout(self.norm(summed_BSD) * (segments_BS > 0).unsqueeze(-1), key))

    def positions(self, segments_BS: Tensor) -> Tensor:
        """Absolute-position vectors, counted from each document's first token, neither normalised nor masked."""
        if segments_BS.shape[1] > self.longest:
            raise ConfigError(
                f"a sequence of {segments_BS.shape[1]} tokens is longer than the position table "
                f"(max_position_embeddings={self.longest}); cut the input"
            )
        return self.look_up("position", position_ids(segments_BS))

    def look_up(self, table: Literal["word", "position"], index_BS: Tensor) -> Tensor:
        """Rows of a table, [B, S, E]."""
        return getattr(self, table)(index_BS)


class SharedEmbeddings(Embeddings):
    """Embeddings that read another model's tables (arXiv 2111.09543, section 3.3).

    Disentangled, they add what they learn themselves, `word_delta`, to the other's rows, into which no gradient flows.
    The sum is made of the rows that are looked up, so no table of sums exists. The lender is no part of this module:
    its parameters have their names where they belong, and whatever takes the place of its tables is found there.
    """

    def __init__(self, config: DebertaConfig, *, is_disentangled: bool):
        super().__init__(config)
        self.is_disentangled = is_disentangled
        read = ("word", "position") if self.adds_positions else ("word",)
        for name in ("word", "position"):
            table = getattr(self, name)
            delattr(self, name)
            if is_disentangled and name in read:
                setattr(self, f"{name}_delta", table)
        self.lender: tuple[Embeddings, ...] = ()

    def borrow_from(self, lender: Embeddings) -> None:
        """Read the tables of `lender`."""
        self.lender = (lender,)  # in a tuple, where nn.Module does not take it for a part

    def look_up(self, table: Literal["word", "position"], index_BS: Tensor) -> Tensor:
        """Rows of the lender's table, [B, S, E]; disentangled, plus rows of the delta."""
        (lender,) = self.lender
        if not self.is_disentangled:
            return lender.look_up(table, index_BS)
        with torch.no_grad():
            lent_BSE = lender.look_up(table, index_BS)
        return lent_BSE + getattr(self, f"{table}_delta")(index_BS)


def position_ids(segments_BS: Tensor) -> Tensor:
    """Position of every token within its document: a document begins where its number first appears, [B, S]."""
    index_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    document_BS = segments_BS.cummax(dim=1).values
    previous_BS = torch.cat([torch.zeros_like(document_BS[:, :1]), document_BS[:, :-1]], dim=1)
    first_BS = torch.where(document_BS > previous_BS, index_S, 0).cummax(dim=1).values
    return index_S - first_BS
