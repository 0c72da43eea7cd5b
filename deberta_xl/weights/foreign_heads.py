"""Heads of models that others have fine-tuned: transformers' classes, and the original's classifier.

| head | transformers' class (v2 and v3; v1's are without V2) | its output layer |
|---|---|---|
| classification, regression, multi_label | DebertaV2ForSequenceClassification | classifier, over the pooled [CLS] |
| choice | DebertaV2ForMultipleChoice | classifier, over the pooled [CLS] |
| token | DebertaV2ForTokenClassification | classifier |
| span | DebertaV2ForQuestionAnswering | qa_outputs |

The original's configuration names no class. Its classifier over the pooled [CLS] is read; what it has for tokens and
for questions has layers that ours has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import Activation, DebertaConfig, HeadConfig, HeadKind
from deberta_xl.tasks.task import Metric, Source, Task
from deberta_xl.weights.foreign import open_foreign, read_config_fields, stated_length
from deberta_xl.weights.foreign_config import activation
from deberta_xl.weights.head_facts import HeadFacts
from deberta_xl.weights.names import EXTRA
from deberta_xl.weights.native_config import explain

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
LONGEST = 512
NAMED_CLASSES: tuple[HeadKind, ...] = ("classification", "multi_label", "token")
"""Kinds whose outputs have names."""


SPAN_OUTPUT, OUTPUT = "qa_outputs.", "classifier."
"""Their output layer of a span, and what every output layer is called with us."""


def from_their_head(name: str) -> str:
    """Our name of an output layer's parameter; any other name as it is."""
    return OUTPUT + name.removeprefix(SPAN_OUTPUT) if name.startswith(SPAN_OUTPUT) else name


def to_their_head(name: str, kind: HeadKind) -> str:
    """Their name of an output layer's parameter."""
    return name.replace(OUTPUT, SPAN_OUTPUT) if kind == "span" else name


class Pooling(NamedTuple):
    """What stands between [CLS] and a head's output layer, besides weights."""

    pooler_act: Activation = "gelu"
    pooler_dropout: float = 0.0


def read_pooling(fields: Mapping[str, Any]) -> Pooling:
    """The pooler of a released configuration: transformers' fields, or the original's section `pooling`.

    Where neither says anything, transformers takes gelu and the original the encoder's own activation. Raises
    ConfigError for what we do not compute, and when the two disagree.
    """
    section = fields.get("pooling")
    section = section if isinstance(section, Mapping) else {}
    if unknown := sorted(section.keys() - {"hidden_act", "dropout", "hidden_size"}):
        raise ConfigError(f"pooling.{unknown[0]}={section[unknown[0]]!r} is not supported: no pooler of ours has that")
    acts = {"pooler_hidden_act": fields.get("pooler_hidden_act"), "pooling.hidden_act": section.get("hidden_act")}
    stated = {name: activation(name, value) for name, value in acts.items() if value is not None}
    if len(set(stated.values())) > 1:
        raise ConfigError(f"{' but '.join(f'{n}={acts[n]!r}' for n in stated)}: which one was it trained with?")
    is_original = not fields.get("model_type")
    unstated = activation("hidden_act", fields.get("hidden_act", "gelu")) if is_original else "gelu"
    dropout = section.get("dropout") if fields.get("pooler_dropout") is None else fields["pooler_dropout"]
    return Pooling(next(iter(stated.values()), unstated), float(dropout or 0.0))


def read_foreign_task(folder: Path) -> tuple[DebertaConfig, HeadFacts, dict[str, Tensor]]:
    """Architecture, head and weights, under our names, of a model that others have fine-tuned.

    Raises CheckpointError when its configuration names none of the classes above or asks for what we do not compute,
    or when its weights have no such layer.
    """
    fields = read_config_fields(folder) or {}
    model = open_foreign(folder, may_be_fresh=True)
    weights = {name.removeprefix(EXTRA): tensor for name, tensor in model.tensors.items()}
    weights |= {from_their_head(name): weight for name, weight in weights.items() if name.startswith(SPAN_OUTPUT)}
    kind = foreign_kind(folder, fields, weights)
    if "classifier.weight" not in weights:
        raise CheckpointError(f"{folder} has no output layer for {CLASSES[kind]}: it is no fine-tuned model")
    try:
        facts = describe_task(folder, fields, kind, weights["classifier.weight"].shape[0], model.config)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its head cannot be loaded: {explain(error)}") from error
    return model.config, facts, {name: tensor.read() for name, tensor in weights.items()}


def describe_task(
    folder: Path, fields: Mapping[str, Any], kind: HeadKind, num_labels: int, config: DebertaConfig
) -> HeadFacts:
    """What a configuration says of its head, which has `num_labels` outputs. Raises ConfigError when it cannot be."""
    if kind == "classification" and num_labels == 1 and fields.get("problem_type") is None:
        kind = "regression"  # transformers', too, where nothing else is said
    # transformers has no dropout before the output layer of a span.
    unstated = 0.0 if kind == "span" else config.hidden_dropout
    dropout = fields.get("cls_dropout")
    is_pooled = HeadConfig(kind=kind, num_labels=num_labels).is_pooled
    head = HeadConfig(
        kind=kind,
        num_labels=num_labels,
        dropout=float(unstated if dropout is None else dropout),
        **(read_pooling(fields)._asdict() if is_pooled else {}),
    )
    labels = label_names(fields, num_labels) if kind in NAMED_CLASSES else []
    metrics = [DEFAULT_METRICS[kind]]
    task = Task(name=folder.name, head=kind, metrics=metrics, labels=labels or None, sources=[Source(files={})])
    length = stated_length(folder) or min(LONGEST, config.max_position_embeddings)
    if config.position_biased_input:
        length = min(length, config.max_position_embeddings)
    return HeadFacts(head, labels, task, length, length // 4, False)


def label_names(fields: Mapping[str, Any], num_labels: int) -> list[str]:
    """The classes' names; transformers leaves out those that it would make up itself.

    Raises ConfigError when there are names, and not one for each of the head's outputs.
    """
    names = fields.get("id2label") or {str(number): f"LABEL_{number}" for number in range(num_labels)}
    if set(names) != {str(number) for number in range(num_labels)}:
        raise ConfigError(
            f"id2label names the classes {', '.join(map(str, names))}, but the output layer has {num_labels} outputs, "
            f"0 … {num_labels - 1}"
        )
    return [str(names[str(number)]) for number in range(num_labels)]


def foreign_kind(folder: Path, fields: Mapping[str, Any], names: Mapping[str, Any]) -> HeadKind:
    """The kind of head that a configuration speaks of; `names` are its tensors."""
    named = (fields.get("architectures") or [None])[0]
    if named is None and not fields.get("model_type"):
        return original_kind(folder, names)
    architecture = re.sub(r"^Deberta(?=For)", "DebertaV2", str(named))
    if architecture == POOLED:
        problem = fields.get("problem_type")
        kind = next((kind for kind, name in PROBLEMS.items() if name == problem), "classification")
        if problem not in (None, PROBLEMS[kind]):
            raise CheckpointError(
                f"{folder}: problem_type={problem!r} is not known; known: {', '.join(PROBLEMS.values())}"
            )
        return kind
    kind = next((kind for kind, name in CLASSES.items() if name == architecture), None)
    if kind is None:
        known = ", ".join(dict.fromkeys(CLASSES.values()))
        raise CheckpointError(f"{folder}: architectures is {named!r}; fine-tuned models can be of: {known}")
    return kind


def original_kind(folder: Path, names: Mapping[str, Any]) -> HeadKind:
    """The kind of head in a folder of the original's, which names none: its tensors tell."""
    if {"pooler.dense.weight", "classifier.weight"} <= set(names):
        if names["classifier.weight"].shape[0] == 1:
            raise CheckpointError(
                f"{folder}: a head with one output is a regression or a choice, and the original's configuration does "
                f'not say which: add "architectures": ["{POOLED}"] or ["{CLASSES["choice"]}"] to it'
            )
        return "classification"
    raise CheckpointError(
        f"{folder}: its configuration names no class of head, and it has no pooler and classifier, which are all that "
        "is known of the original's heads"
    )
