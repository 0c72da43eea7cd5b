"""head.json: what a fine-tuned model knows of its task, beside its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import HeadConfig
from deberta_xl.tasks.task import Source, Submission, Task

HEAD_NAME = "head.json"


class HeadFacts(NamedTuple):
    """What a fine-tuned model knows of its task: the contents of head.json."""

    head: HeadConfig
    labels: list[str]
    """Names of the classes, [] where there are none."""
    task: Task
    sequence_length: int
    document_stride: int
    normalized_twice: bool
    """Whether SiFT's original variant normalises the embeddings once more, in evaluation too."""

    def to_json(self) -> bytes:
        """The file."""
        fields = self._asdict() | {"head": dataclasses.asdict(self.head), "task": dataclasses.asdict(self.task)}
        return (json.dumps(fields, indent=2) + "\n").encode()


def read_head(folder: Path) -> HeadFacts:
    """What head.json of a fine-tuned folder says. Raises CheckpointError when there is none."""
    path = folder / HEAD_NAME
    try:
        fields = read_json(path)
        task = fields["task"]
        sources = [Source(**source) for source in task["sources"]]
        task = Task(**task | {"sources": sources, "submission": Submission(**task["submission"])})
        return HeadFacts(**fields | {"head": HeadConfig(**fields["head"]), "task": task})
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {HEAD_NAME}: it is no fine-tuned model; make one with deberta_xl/finetune.py"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it from a copy") from error
