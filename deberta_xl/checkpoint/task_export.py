"""Fine-tuned models to and from Hugging Face: `AutoModelForSequenceClassification` and its kin.

| head | transformers' class | its output layer |
|---|---|---|
| classification, regression, multi_label | DebertaV2ForSequenceClassification | classifier, over the pooled [CLS] |
| choice | DebertaV2ForMultipleChoice | classifier, over the pooled [CLS] |
| token | DebertaV2ForTokenClassification | classifier |
| span | DebertaV2ForQuestionAnswering | qa_outputs |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deberta_xl.architecture import DebertaConfig, HeadConfig, HeadKind
from deberta_xl.checkpoint.export import cast, check_expressible, refuse_existing, write_folder
from deberta_xl.checkpoint.foreign import find_foreign_config, read_config_fields, read_file, weight_files
from deberta_xl.checkpoint.foreign_config import to_huggingface_config
from deberta_xl.checkpoint.head_facts import HeadFacts, read_head
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.names import from_microsoft, to_microsoft
from deberta_xl.checkpoint.native_config import read_native_config
from deberta_xl.checkpoint.tokenizer_export import json_bytes, tokenizer_files
from deberta_xl.checkpoint.weights import CONFIG_NAME, TOKENIZER_NAME, read_weights
from deberta_xl.data.tasks import Metric, Source, Task
from deberta_xl.data.tokenizer import Tokenizer

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
POOLER = "pooler.dense"
"""Named alike on both sides."""


def to_huggingface(name: str, kind: HeadKind) -> str:
    """Our name of a fine-tuned model's parameter -> transformers'."""
    if name.startswith("classifier."):
        return name.replace("classifier", "qa_outputs") if kind == "span" else name
    return name if name.startswith(POOLER) else to_microsoft(name)


def from_huggingface(name: str) -> str | None:
    """transformers' name -> ours; None for what is no parameter of a fine-tuned model."""
    if name.startswith("qa_outputs."):
        return name.replace("qa_outputs", "classifier")
    return name if name.startswith(("classifier.", POOLER)) else from_microsoft(name)


def export_task(source: Path, destination: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a fine-tuned model, a verified native folder, as a Hugging Face folder: all of it, or nothing.

    Raises CheckpointError when it cannot be expressed there, or when `destination` exists and is not empty.
    """
    refuse_existing(destination)
    config, facts = read_native_config(source / CONFIG_NAME), read_head(source)
    check_expressible(config)
    if facts.normalized_twice:
        raise CheckpointError(
            f"{source} was trained with sift.entry=normalized_twice, the original's: its embeddings are normalised "
            "twice, which transformers cannot do; train with sift.entry=scaled to export"
        )
    fields = head_fields(config, facts) | {"dtype": str(dtype).removeprefix("torch.")}
    files = {CONFIG_NAME: json_bytes(fields)}
    tokenizer = Tokenizer.load(source / TOKENIZER_NAME)
    files |= tokenizer_files(tokenizer, max_length=config.max_position_embeddings)
    weights = {to_huggingface(n, facts.head.kind): cast(n, w, dtype) for n, w in read_weights(source).items()}
    write_folder(destination, weights, files)


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

    Raises CheckpointError when its configuration names none of the classes above.
    """
    fields = read_config_fields(folder) or {}
    kind = foreign_kind(folder, fields)
    names = fields.get("id2label") or {}
    labels = [str(names[key]) for key in sorted(names, key=int)]
    weights = {}
    for file in weight_files(folder):
        found = {from_huggingface(name): tensor for name, tensor in read_file(file).items()}
        weights |= {name: tensor for name, tensor in found.items() if name is not None}
    if "classifier.weight" not in weights:
        raise CheckpointError(f"{folder} has no classifier: it is no fine-tuned model")
    config = find_foreign_config(folder)
    dropout = fields.get("cls_dropout")
    head = HeadConfig(
        kind=kind,
        num_labels=weights["classifier.weight"].shape[0],
        dropout=float(config.hidden_dropout if dropout is None else dropout),
    )
    has_classes = kind in ("classification", "multi_label", "token")
    labels = labels if has_classes else []
    task = Task(
        name=folder.name,
        head=kind,
        metrics=[DEFAULT_METRICS[kind]],
        labels=labels or None,
        sources=[Source(files={})],
    )
    length = min(512, config.max_position_embeddings)
    return config, HeadFacts(head, labels, task, length, length // 4, False), weights


def foreign_kind(folder: Path, fields: dict[str, Any]) -> HeadKind:
    """The kind of head that a configuration speaks of."""
    architecture = (fields.get("architectures") or [None])[0]
    if architecture == POOLED:
        problem = fields.get("problem_type")
        return next((kind for kind, name in PROBLEMS.items() if name == problem), "classification")
    kind = next((kind for kind, name in CLASSES.items() if name == architecture), None)
    if kind is None:
        known = ", ".join(dict.fromkeys(CLASSES.values()))
        raise CheckpointError(
            f"{folder}: architectures is {architecture!r}; fine-tuned models that can be read: {known}"
        )
    return kind
