"""Errors that a user can cause and mend; they have one base."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class UserError(ValueError):
    """Something a user wrote or has on disk cannot be used; the message says what, and the way out.

    Commands print the message alone and exit with status 2 (a training command that has joined its ranks already, with
    `training_command.REFUSED`); anything else that is raised is a fault of ours.
    """


class HopelessRunError(UserError):
    """A training run cannot come to anything, and the same command would end there again. Raised on all ranks."""


class Diverged(HopelessRunError):
    """A training run has no finite values any more; the message says which, `training/safeguard.py` the way out."""


class ConfigError(UserError):
    """What a user wrote cannot be run; the message names the key, the value and the way out."""


class PeerError(ConnectionError):
    """Other ranks did not come, or went before the run began; why, they alone can say."""


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
