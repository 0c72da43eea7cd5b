"""How long a text can be: as long as the rows that a model was trained on, unless more is asked for."""

from __future__ import annotations

from typing import Literal, NamedTuple

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import logger
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import Learnt

Limit = Literal["max_length", "trained_length", "position_table"]


class Room(NamedTuple):
    """What a text that is written has to fit into."""

    length: int
    """Tokens at most, with [CLS] before them: the last one has the last position."""
    limit: Limit
    """What says so."""

    @classmethod
    def of(cls, config: DebertaConfig, learnt: Learnt, max_length: int | None) -> Room:
        """As long as asked for, or else as the rows of the training were. Raises ConfigError for more than positions.

        Further positions have learnt nothing, and nobody would see it from the text that it goes on without them.
        """
        positions, trained = config.max_position_embeddings, learnt.sequence_length
        if max_length is not None:
            if max_length > positions:
                raise ConfigError(f"max_length={max_length} is more than the {positions} positions of the model")
            return cls(max_length, "max_length")
        if trained is not None and trained < positions:
            return cls(trained, "trained_length")
        return cls(positions, "position_table")

    @property
    def name(self) -> str:
        """What it is that is full."""
        return {
            "max_length": f"the {self.length} tokens of max_length",
            "trained_length": f"the {self.length} tokens of a row in the model's training",
            "position_table": f"the {self.length} positions of the model",
        }[self.limit]

    @property
    def way_out(self) -> str:
        """How there would be more of it, where that is possible."""
        return "; max_length allows more, which it has never seen" if self.limit == "trained_length" else ""


def warn_of_length(learnt: Learnt, length: int) -> None:
    """Say that a text is longer than all that a model was trained on."""
    if learnt.sequence_length is not None and length > learnt.sequence_length:
        logger.warning(
            "the text has %d tokens, and the model was trained on rows of %d: of positions behind those it has learnt "
            "nothing, so expect less there",
            length, learnt.sequence_length,
        )  # fmt: skip
