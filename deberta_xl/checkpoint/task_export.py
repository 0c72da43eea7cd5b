"""Fine-tuned models to and from Hugging Face: `AutoModelForSequenceClassification` and its kin.

| head | transformers' class | its output layer |
|---|---|---|
| classification, regression, multi_label | DebertaV2ForSequenceClassification | classifier, over the pooled [CLS] |
| choice | DebertaV2ForMultipleChoice | classifier, over the pooled [CLS] |
| token | DebertaV2ForTokenClassification | classifier |
| span | DebertaV2ForQuestionAnswering | qa_outputs |

To `convert.py` these layers are riders: it carries them along unread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deberta_xl.architecture import DebertaConfig, HeadConfig, HeadKind
from deberta_xl.checkpoint.convert import check_expressible
from deberta_xl.checkpoint.destination import whole_or_nothing
from deberta_xl.checkpoint.foreign import open_foreign, read_config_fields
from deberta_xl.checkpoint.foreign_config import to_huggingface_config
from deberta_xl.checkpoint.head_facts import HeadFacts, read_head
from deberta_xl.checkpoint.lazy import LazyTensors, in_type
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.names import EXTRA, to_microsoft
from deberta_xl.checkpoint.native_config import read_native_config
from deberta_xl.checkpoint.pretrained_folder import Pretrained
from deberta_xl.checkpoint.tensor_writer import most_common_type, total_bytes, write_shards
from deberta_xl.checkpoint.tokenizer_export import json_bytes, tokenizer_files
from deberta_xl.checkpoint.weights import CONFIG_NAME, TOKENIZER_NAME, open_weights
from deberta_xl.data.tasks import Metric, Source, Task
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.durable import write_files

POOLED = "DebertaV2ForSequenceClassification"
CLASSES: dict[HeadKind, str] = {
    "classification": POOLED,
    "regression": POOLED,
    "multi_label": POOLED,
    "choice": "DebertaV2ForMultipleChoice",
    "token": "DebertaV2ForTokenClassification",
    "span": "DebertaV2ForQuestionAnswering",
}
PROBLEMS: dict[HeadKind, str] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}
DEFAULT_METRICS: dict[HeadKind, Metric] = {
    "classification": "accuracy",
    "regression": "pearson_spearman",
    "multi_label": "micro_f1",
    "choice": "accuracy",
    "token": "span_f1",
    "span": "squad_f1",
}
HEAD = ("pooler.", "classifier.")
LONGEST = 512


def to_huggingface(name: str, kind: HeadKind) -> str:
    """Our name of a fine-tuned model's parameter -> transformers'."""
    if not name.startswith(HEAD):
        return to_microsoft(name)
    return name.replace("classifier.", "qa_outputs.") if kind == "span" else name


def export_task(source: Path, destination: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a fine-tuned model, a verified native folder, as a Hugging Face folder: all of it, or nothing.

    Raises CheckpointError when it cannot be expressed there, or when `destination` exists and is not empty.
    """
    config, facts = read_native_config(source / CONFIG_NAME), read_head(source)
    named = {to_huggingface(name, facts.head.kind): tensor for name, tensor in open_weights(source).items()}
    tensors: LazyTensors = in_type(named, dtype)
    check_expressible(Pretrained(folder=source, kind="native", config=config, tensors=tensors))
    if facts.normalized_twice:
        raise CheckpointError(
            f"{source} was trained with sift.entry=normalized_twice, the original's: its embeddings are normalised "
            "twice, which transformers cannot do; train with sift.entry=scaled to export"
        )
    fields = head_fields(config, facts) | {"dtype": str(most_common_type(tensors)).removeprefix("torch.")}
    tokenizer = Tokenizer.load(source / TOKENIZER_NAME)
    files = {CONFIG_NAME: json_bytes(fields)}
    files |= tokenizer_files(tokenizer, max_length=config.max_position_embeddings)
    with whole_or_nothing(destination, total_bytes(tensors)) as partial:
        write_files(partial, files)
        write_shards(partial, tensors)


def head_fields(config: DebertaConfig, facts: HeadFacts) -> dict[str, Any]:
    """Fields of the `config.json`."""
    kind = facts.head.kind
    names = facts.labels or [f"LABEL_{number}" for number in range(facts.head.num_labels)]
    fields = to_huggingface_config(config) | {
        "architectures": [CLASSES[kind]],
        "cls_dropout": facts.head.dropout,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return fields | ({"problem_type": PROBLEMS[kind]} if kind in PROBLEMS else {})


def read_foreign_task(folder: Path) -> tuple[DebertaConfig, HeadFacts, dict[str, Tensor]]:
    """Architecture, head and weights, under our names, of a model that transformers has fine-tuned.

    Raises CheckpointError when its configuration names none of the classes above, or its weights have no such layer.
    """
    fields = read_config_fields(folder) or {}
    kind = foreign_kind(folder, fields)
    model = open_foreign(folder, may_be_fresh=True)
    weights = {name.removeprefix(EXTRA): tensor.read() for name, tensor in model.tensors.items()}
    weights |= {n.replace("qa_outputs.", "classifier."): w for n, w in weights.items() if n.startswith("qa_outputs.")}
    if "classifier.weight" not in weights:
        raise CheckpointError(f"{folder} has no output layer for {CLASSES[kind]}: it is no fine-tuned model")
    chosen = fields.get("cls_dropout")
    dropout = float(model.config.hidden_dropout if chosen is None else chosen)
    num_labels = weights["classifier.weight"].shape[0]
    if kind == "classification" and num_labels == 1:
        kind = "regression"  # transformers', too, where nothing else is said
    head = HeadConfig(kind=kind, num_labels=num_labels, dropout=dropout)
    labels = label_names(fields, num_labels) if kind in ("classification", "multi_label", "token") else []
    metrics = [DEFAULT_METRICS[kind]]
    task = Task(name=folder.name, head=kind, metrics=metrics, labels=labels or None, sources=[Source(files={})])
    length = min(LONGEST, model.config.max_position_embeddings)
    return model.config, HeadFacts(head, labels, task, length, length // 4, False), weights


def label_names(fields: dict[str, Any], num_labels: int) -> list[str]:
    """The classes' names; transformers leaves out those that it would make up itself."""
    names = fields.get("id2label") or {}
    return [str(names.get(str(number), f"LABEL_{number}")) for number in range(num_labels)]


def foreign_kind(folder: Path, fields: dict[str, Any]) -> HeadKind:
    """The kind of head that a configuration speaks of."""
    architecture = (fields.get("architectures") or [None])[0]
    if architecture == POOLED:
        problem = fields.get("problem_type")
        return next((kind for kind, name in PROBLEMS.items() if name == problem), "classification")
    kind = next((kind for kind, name in CLASSES.items() if name == architecture), None)
    if kind is None:
        known = ", ".join(dict.fromkeys(CLASSES.values()))
        raise CheckpointError(f"{folder}: architectures is {architecture!r}; fine-tuned models can be of: {known}")
    return kind
