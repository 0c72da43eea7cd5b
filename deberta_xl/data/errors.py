"""What can be wrong with a user's text, tokenizer or dataset. Every message names the file and the way out."""

from __future__ import annotations

from deberta_xl.errors import UserError


class DataError(UserError):
    """Base of the errors of the data path."""


class CorpusError(DataError):
    """The input text cannot be read."""


class TokenizerError(DataError):
    """A tokenizer cannot be trained or loaded, or does not fit."""


class TokenStoreError(DataError):
    """A dataset on disk cannot be written, or is missing, damaged or not what it claims to be."""


class TaskDataError(DataError):
    """A task's files, or its description, cannot be used."""
