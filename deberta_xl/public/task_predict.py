"""Using fine-tuned models: one, or several whose logits are averaged, on texts or on a split of a task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import Launch
from deberta_xl.base.progress import progress
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.sift import normalized
from deberta_xl.objectives.task_evaluation import task_logits
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.public.text_batches import memory_advice
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.predictions import Prediction, predictions_of
from deberta_xl.tasks.reading import ExampleReader
from deberta_xl.tasks.records import Record, TaskDataError, read_jsonl
from deberta_xl.tasks.submission import describe
from deberta_xl.tasks.task import Example, Source
from deberta_xl.weights.finetuned_folder import find_finetuned
from deberta_xl.weights.named_folder import find_tokenizer

CHUNK = 4096
"""Records of a file that are held at once."""
COLUMNS = {"choice": ("context", None), "span": ("context", "question"), "token": ("words", None)}
"""Keys of a record's texts; other kinds have `text`, and `text_pair` where there are two."""


class Predictor:
    """Fine-tuned models of one task. Every rank holds them whole, and predicts its share of the examples."""

    def __init__(
        self,
        checkpoints: Sequence[Path],
        launch: Launch,
        device: torch.device,
        micro_batch_tokens: int,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        """Raises ConfigError when the checkpoints do not belong to one task and tokenizer, CheckpointError as usual."""
        self.launch, self.device, self.micro_batch_tokens = launch, device, micro_batch_tokens
        folders = [find_finetuned(checkpoint) for checkpoint in checkpoints]
        self.models = [
            DebertaForTask.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device) for folder in folders
        ]
        tokenizers = [Tokenizer.load(find_tokenizer(folder)) for folder in folders]
        self.facts, self.tokenizer = self.models[0].facts, tokenizers[0]
        for checkpoint, model, tokenizer in zip(checkpoints, self.models, tokenizers, strict=True):
            ours, theirs = self.facts, model.facts
            lengths = (ours.sequence_length, ours.document_stride)
            if (theirs.sequence_length, theirs.document_stride) != lengths:
                raise ConfigError(
                    f"{checkpoint} reads {theirs.sequence_length} tokens with a stride of {theirs.document_stride}, "
                    f"{checkpoints[0]} reads {lengths[0]} and {lengths[1]}: they cannot be averaged"
                )
            if (theirs.head.kind, theirs.labels) != (ours.head.kind, ours.labels):
                raise ConfigError(
                    f"{checkpoint} predicts {theirs.head.kind} of {theirs.labels}, {checkpoints[0]} predicts "
                    f"{ours.head.kind} of {ours.labels}: only models of one task can be averaged"
                )
            if tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise ConfigError(f"{checkpoint} has another tokenizer than {checkpoints[0]}; they cannot be averaged")

    def tokenize(self, examples: Sequence[Example], where: str, labels: Sequence[str] | None = None) -> TaskData:
        """Examples as the models were trained on them; their `labels` are the models' own unless more are given."""
        facts = self.facts
        return TaskData(
            facts.task,
            facts.labels if labels is None else labels,
            examples,
            self.tokenizer,
            sequence_length=facts.sequence_length,
            document_stride=facts.document_stride,
            is_training=False,
            where=where,
        )

    def predict(self, data: TaskData) -> list[Prediction]:
        """Predictions from the mean of the models' logits, on every rank. Collective."""
        parts = []
        for model in self.models:
            run = Evaluator(model=model, device=self.device, rank=self.launch.rank, size=self.launch.world_size)
            entry = normalized if model.facts.normalized_twice else None
            with memory_advice(self.micro_batch_tokens):
                parts.append(task_logits(run, data, micro_batch_tokens=self.micro_batch_tokens, entry=entry))
        return predictions_of(data, {n: np.mean([part[n] for part in parts], axis=0) for n in parts[0]})

    def predict_file(self, path: Path) -> Iterator[str]:
        """A line of JSON for every line of a .jsonl file, chunk by chunk. Collective."""
        with progress(str(path), count_lines(path), "lines") as advance:
            for records in chunks(read_jsonl(path)):
                yield from self.predict_records(records, str(path))
                advance(len(records))

    def predict_records(self, records: Sequence[tuple[int, Record]], where: str) -> Iterator[str]:
        """A line of JSON for every record, by its number. Collective."""
        examples = [self.read(record, number) for number, record in records]
        found = self.predict(self.tokenize(examples, where))
        for (number, record), example, prediction in zip(records, examples, found, strict=True):
            described = describe(self.facts.task, self.facts.labels, example, prediction)
            described["id"] = record.fields.get("id", number)
            yield json.dumps(described, ensure_ascii=False) + "\n"

    def read(self, record: Record, number: int) -> Example:
        """One record of a user's file, without label."""
        task = self.facts.task
        has_pair = task.takes_pairs or "text_pair" in record.fields
        first, second = COLUMNS.get(task.head, ("text", "text_pair" if has_pair else None))
        texts = ExampleReader(task, Source(files={}, first=first, second=second)).texts(record)
        if not texts:
            raise TaskDataError(f"{record.place}: there is no word to label")
        return Example(str(number), texts)


def count_lines(path: Path) -> int:
    """Lines of a file; 0 of a pipe, which can be read only once."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def chunks(records: Iterator[Record]) -> Iterator[list[tuple[int, Record]]]:
    """Numbered records, some thousands at a time."""
    chunk: list[tuple[int, Record]] = []
    for number, record in enumerate(records):
        chunk.append((number, record))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
