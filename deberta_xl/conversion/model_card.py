"""The model card of an exported folder: what the model is, what it was trained on and how, and what it is for."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.lazy import LazyTensors
from deberta_xl.checkpoint.manifest import STATE_NAME
from deberta_xl.conversion.card_example import encoder_example, fill_mask_example, task_example
from deberta_xl.conversion.card_metadata import OF_THE_BODY, CardMetadata, base_model_of, front_matter
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.settings.architecture import DebertaConfig, HeadKind
from deberta_xl.weights.head_facts import HeadFacts
from deberta_xl.weights.names import DETECTOR, is_beside_the_model
from deberta_xl.weights.pretrained_folder import Pretrained

RESULTS_NAME = "results.json"
UNKNOWN = "Not recorded with these weights.\n"
PIPELINES: dict[HeadKind, str] = {
    "classification": "text-classification",
    "regression": "text-classification",
    "multi_label": "text-classification",
    "choice": "multiple-choice",
    "token": "token-classification",
    "span": "question-answering",
}


def model_card(model: Pretrained, tokenizer: Tokenizer | None, metadata: CardMetadata) -> str:
    """`README.md` in the Hub's form. What is not recorded is said to be missing, never guessed."""
    run = run_folder(model.folder)
    decoded = "with an" if model.config.num_decoder_passes else "without an"
    how = "by replaced token detection" if DETECTOR in model.tensors else f"{decoded} enhanced mask decoder"
    is_discriminator = DETECTOR in model.tensors
    writing = TEXT.format(model.learnt.writes_as) if model.learnt.writes_as else NO_TEXT
    facts = {
        "Architecture": architecture(model.config, model.tensors),
        "Training data": data_facts(model.folder),
        "Training arguments": training_arguments(run),
        "Metrics": last_metrics(model.folder),
    }
    return card(
        (run or model.folder).resolve().name,
        f"A DeBERTa encoder pretrained {how}, written by deberta_xl.",
        (encoder_example if is_discriminator else fill_mask_example)(tokenizer, metadata.example),
        facts,
        (DISCRIMINATOR_USE if is_discriminator else INTENDED_USE.format(writing=writing) + loading(model.config))
        + longer_sequences(model.config),
        pipeline="feature-extraction" if is_discriminator else "fill-mask",
        metadata=with_base_model(metadata, run),
    )


def task_card(model: Pretrained, head: HeadFacts, tokenizer: Tokenizer, metadata: CardMetadata) -> str:
    """`README.md` of a fine-tuned model: its task, its labels, and the metrics of its run."""
    run = task_run_folder(model.folder)
    kind = head.head.kind
    task = {
        "task": head.task.name,
        "kind": kind,
        "labels": ", ".join(head.labels) or None,
        "longest sequence in training": head.sequence_length,
    }
    facts = {
        "Task": {name: value for name, value in task.items() if value is not None},
        "Metrics": task_metrics(model.folder, run),
        "Architecture": architecture(model.config, model.tensors) | {"decoder": "none (of pretraining alone)"},
        "Training arguments": training_arguments(run),
    }
    return card(
        (run or model.folder).resolve().name,
        f"A DeBERTa encoder fine-tuned for {plain(head.task.name)} ({kind.replace('_', ' ')}), written by deberta_xl.",
        task_example(kind, tokenizer, metadata.example, is_pair=head.task.takes_pairs),
        facts,
        TASK_USE + longer_sequences(model.config),
        pipeline=PIPELINES[kind],
        metadata=with_base_model(metadata, run),
    )


def card(
    name: str,
    description: str,
    example: str,
    facts: Mapping[str, Mapping[str, Any]],
    use: str,
    *,
    pipeline: str,
    metadata: CardMetadata,
) -> str:
    """A card from its parts; `facts` are its tables."""
    tags = dict.fromkeys(("deberta", pipeline, *metadata.tags))
    stated = {key: value for key, value in vars(metadata).items() if key not in (*OF_THE_BODY, "tags") and value}
    matter = {**stated, "library_name": "transformers", "pipeline_tag": pipeline, "tags": list(tags)}
    tables = [
        text
        for heading, rows in facts.items()
        for text in (f"## {heading}\n", *(table(rows) if rows else [UNKNOWN]), "")
    ]
    return "\n".join(
        [
            front_matter(matter),
            f"# {plain(metadata.title or name)}\n",
            f"{metadata.description or description}\n",
            "## Example\n",
            f"```python\n{example}```\n",
            *tables,
            "## Intended use\n",
            use,
        ]
    )


INTENDED_USE = """\
As an encoder to be fine-tuned for classification, tagging, question answering or retrieval, and for filling masks.
{writing} It repeats the biases of the text it was trained on; examine it on your own data before use.
"""
NO_TEXT, TEXT = "It generates no text.", "`tools/generate.py` of deberta_xl writes with it, under {} masks."
DISCRIMINATOR_USE = """\
As an encoder to be fine-tuned for classification, tagging, question answering or retrieval. It is the discriminator of
replaced token detection: it fills no masks and generates no text. It repeats the biases of the text it was trained on;
examine it on your own data before use.

`AutoModel`, the `AutoModelFor…` of tasks and `AutoTokenizer` load this folder. They leave aside `mask_predictions`, the
head that finds replaced tokens; `tools/detect.py` of deberta_xl uses it. Where there is a folder `generator`, it is the
masked language model that it was trained with.
"""
TASK_USE = """\
For texts like those it was trained on. It repeats the biases of that text, and of what its encoder was pretrained on;
examine it on your own data before use.
"""


def loading(config: DebertaConfig) -> str:
    """What loads an export, and where transformers predicts otherwise than we do."""
    if config.predicts_from_last_state:
        return """
`AutoModel` and `AutoTokenizer` load this folder. `AutoModelForMaskedLM` and `DebertaForMaskedLM` of deberta_xl predict
alike, from the encoder's last state.
"""
    aside = ["`deberta.embeddings.position_embeddings.weight`"] if config.decodes_positions else []
    aside += ["`decoder.layers.#`"] if config.num_own_decoder_layers else []
    left_aside = f"\nand leaves aside what that adds: {' and '.join(aside)}" if aside else ""
    return f"""
`AutoModel` and `AutoTokenizer` load this folder. `AutoModelForMaskedLM` predicts from the encoder's last state, since
transformers has no enhanced mask decoder{left_aside}.
`DebertaForMaskedLM.from_pretrained` of deberta_xl has all of it.
"""


def longer_sequences(config: DebertaConfig) -> str:
    """From which length on transformers computes something else; empty where it never does."""
    if not (config.position_buckets and config.relative_rows) or config.bucket_rule == "transformers":
        return ""
    return f"""
For sequences of more than {config.relative_reach} tokens transformers gives other values than deberta_xl:
for keys that far from their query it reads a row of the relative table that is never trained.
"""


def plain(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", " ".join(text.split()))


def table(facts: Mapping[str, Any]) -> Iterator[str]:
    """Facts as a Markdown table."""
    yield "| | |\n|---|---|"
    for name, value in facts.items():
        yield f"| {plain(name)} | {plain(str(value))} |"


def with_base_model(metadata: CardMetadata, run: Path | None) -> CardMetadata:
    """The metadata with what the run began from, where nothing else is given."""
    init = read_settings(run).get("train", {}).get("init")
    if init is None or metadata.base_model:
        return metadata
    return CardMetadata(**vars(metadata) | {"base_model": (base_model_of(init),)})


def architecture(config: DebertaConfig, tensors: LazyTensors) -> dict[str, Any]:
    """Sizes, and the choices that distinguish the releases."""
    parameters = sum(math.prod(t.shape) for name, t in tensors.items() if not is_beside_the_model(name))
    return {
        "parameters": f"{parameters:,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_heads,
        "feed-forward size": config.intermediate_size,
        "vocabulary": f"{config.vocab_size:,}",
        "longest sequence": config.max_position_embeddings,
        "relative positions": f"{config.position_buckets or 'no'} buckets, {config.relative_reach} told apart"
        if config.relative_rows
        else "none",
        "position terms": config.pos_att_type.replace("|", ", "),
        "n-gram convolution": f"width {config.conv_kernel_size}" if config.conv_kernel_size else "none",
        "decoder": decoder(config),
    }


def decoder(config: DebertaConfig) -> str:
    """How a model predicts, in a few words."""
    if config.has_released_decoder:
        return "none (positions in the input)" if config.position_biased_input else "enhanced mask decoder"
    if not config.num_decoder_passes:
        return "none"
    layers = "layers of its own" if config.num_own_decoder_layers else "passes of the last layer"
    begin = "states and absolute positions" if config.decodes_positions else "states"
    return f"enhanced mask decoder, {config.num_decoder_passes} {layers} over the {begin}"


def run_folder(folder: Path) -> Path | None:
    """The run that a checkpoint belongs to."""
    run = folder.resolve().parent.parent
    return run if folder.resolve().parent.name == "checkpoints" and (run / "config.toml").is_file() else None


def data_facts(folder: Path) -> dict[str, Any]:
    """Fingerprints of what a checkpoint was trained on."""
    if not (folder / STATE_NAME).is_file():
        return {}
    state = read_json(folder / STATE_NAME)
    prints = state.get("fingerprints", {})
    facts = {
        "dataset fingerprint": prints.get("data"),
        "tokenizer fingerprint": prints.get("tokenizer"),
        "sequence length": prints.get("sequence_length"),
        "steps": state.get("step"),
        "sequences seen": state.get("consumed_samples"),
    }
    return {name: json.dumps(v) if isinstance(v, dict) else v for name, v in facts.items() if v is not None}


def task_run_folder(folder: Path) -> Path | None:
    """The run of fine-tuning that weights belong to: those of its checkpoints, or its best."""
    parent = folder.resolve().parent
    return run_folder(folder) or (parent if (parent / "config.toml").is_file() else None)


def read_settings(run: Path | None) -> dict[str, Any]:
    """The run's configuration."""
    return {} if run is None else tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))


#: Paths of the machine it was trained on are nobody's business.
PRIVATE_SECTIONS = ("run", "data")
PRIVATE_KEYS = ("train.init", "task.data", "task.name")


def training_arguments(run: Path | None) -> dict[str, Any]:
    """The run's configuration, section by section."""
    return {
        f"{section}.{key}": value
        for section, values in read_settings(run).items()
        if isinstance(values, dict) and section not in PRIVATE_SECTIONS
        for key, value in values.items()
        if f"{section}.{key}" not in PRIVATE_KEYS
    }


def task_metrics(folder: Path, run: Path | None) -> dict[str, Any]:
    """The metrics of a run's best weights on every split, if these are they."""
    path = run / RESULTS_NAME if run else None
    if path is None or not path.is_file() or folder.resolve().parent != run.resolve():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = {
        f"{split}: {name}": "undefined" if value is None else shown(value)
        for split, values in results["metrics"].items()
        for name, value in values.items()
    }
    return rows | {"of step": results["best_step"], "seed": results["seed"]}


def shown(value: Any) -> Any:
    """A number of a table."""
    return f"{value:.4g}" if isinstance(value, float) else value


def last_metrics(folder: Path) -> dict[str, Any]:
    """The newest value of every loss and accuracy, up to the checkpoint's step."""
    run = run_folder(folder)
    if run is None or not (run / "metrics.jsonl").is_file():
        return {}
    last_step = int(folder.resolve().name.removeprefix("step-"))
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("step", 0) <= last_step:
            found |= {k: v for k, v in record.items() if k == "loss" or k.startswith("valid_")}
    return {key: shown(value) for key, value in found.items()}
