"""Fine-tuned models to Hugging Face: `AutoModelForSequenceClassification` and its kin (see `weights/foreign_heads.py`).

To `convert.py` their output layers are riders: it carries them along unread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deberta_xl.base.durable import write_files
from deberta_xl.checkpoint.destination import refuse_existing, whole_or_nothing
from deberta_xl.checkpoint.lazy import LazyTensors, in_type
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.tensor_writer import DEFAULT_SHARD_BYTES, most_common_type, total_bytes, write_shards
from deberta_xl.conversion.convert import Conversion
from deberta_xl.conversion.expressible import check_expressible
from deberta_xl.conversion.model_card import task_card
from deberta_xl.conversion.tokenizer_export import json_bytes, tokenizer_files
from deberta_xl.conversion.verify_task import verify_task
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.settings.architecture import DebertaConfig, HeadKind
from deberta_xl.weights.foreign_config import activation_there, to_huggingface_config
from deberta_xl.weights.foreign_heads import CLASSES, PROBLEMS, to_their_head
from deberta_xl.weights.head_facts import HeadFacts, read_head
from deberta_xl.weights.names import to_microsoft
from deberta_xl.weights.native import CONFIG_NAME, TOKENIZER_NAME, open_weights
from deberta_xl.weights.native_config import read_native_config
from deberta_xl.weights.pretrained_folder import Pretrained

HEAD = ("pooler.", "classifier.")


def to_huggingface(name: str, kind: HeadKind) -> str:
    """Our name of a fine-tuned model's parameter -> transformers'."""
    if not name.startswith(HEAD):
        return to_microsoft(name)
    return to_their_head(name, kind)


TO_HUGGING_FACE = Conversion(to="huggingface")


def export_task(source: Path, destination: Path, conversion: Conversion = TO_HUGGING_FACE) -> None:
    """Write a fine-tuned model, a verified native folder, as a Hugging Face folder: all of it, or nothing.

    Of `conversion`, what is no change of the model counts. Raises CheckpointError when it cannot be expressed there,
    when `destination` exists and is not empty, or when its logits differ by more than the tolerance.
    """
    refuse_existing(destination)
    config, facts = read_native_config(source / CONFIG_NAME).architecture, read_head(source)
    named = {to_huggingface(name, facts.head.kind): tensor for name, tensor in open_weights(source).items()}
    tensors: LazyTensors = in_type(named, conversion.dtype)
    model = Pretrained(folder=source, kind="native", config=config, tensors=tensors, tokenizer=source / TOKENIZER_NAME)
    check_expressible(model.config)
    if facts.normalized_twice:
        raise CheckpointError(
            f"{source} was trained with sift.variant=original: its embeddings are normalised twice, which transformers "
            "cannot do; train with sift.variant=corrected to export"
        )
    fields = head_fields(config, facts) | {"dtype": str(most_common_type(tensors)).removeprefix("torch.")}
    tokenizer = Tokenizer.load(source / TOKENIZER_NAME)
    files = {CONFIG_NAME: json_bytes(fields)}
    files |= tokenizer_files(tokenizer, max_length=facts.sequence_length)
    if conversion.with_card:
        files["README.md"] = task_card(model, facts, tokenizer, conversion.metadata).encode()
    with whole_or_nothing(destination, total_bytes(tensors)) as partial:
        write_files(partial, files)
        write_shards(partial, tensors, shard_bytes=conversion.shard_bytes or DEFAULT_SHARD_BYTES)
        if conversion.tolerance is not None:
            verify_task(model, partial, conversion.tolerance, conversion.show)


def head_fields(config: DebertaConfig, facts: HeadFacts) -> dict[str, Any]:
    """Fields of the `config.json`."""
    kind = facts.head.kind
    names = facts.labels or [f"LABEL_{number}" for number in range(facts.head.num_labels)]
    fields = to_huggingface_config(config) | {
        "architectures": [CLASSES[kind]],
        "cls_dropout": facts.head.dropout,
        "pooler_hidden_act": activation_there(facts.head.pooler_act),
        "pooler_dropout": facts.head.pooler_dropout,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return fields | ({"problem_type": PROBLEMS[kind]} if kind in PROBLEMS else {})
