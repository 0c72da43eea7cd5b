"""The model card of an exported folder: what the model is, what it was trained on and how, and what it is for."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deberta_xl.checkpoint.names import is_beside_the_model
from deberta_xl.checkpoint.pretrained_folder import Pretrained

STATE_NAME = "state.json"
UNKNOWN = "Not recorded with these weights.\n"


def model_card(model: Pretrained) -> str:
    """`README.md` in the Hub's form. What is not recorded is said to be missing, never guessed."""
    return "\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- deberta\n- fill-mask\n---\n",
            f"# {title(model)}\n",
            "A DeBERTa encoder pretrained with an enhanced mask decoder, written by deberta_xl.\n",
            "## Architecture\n",
            *table(architecture(model)),
            "\n## Training data\n",
            *(table(data) if (data := data_facts(model.folder)) else [UNKNOWN]),
            "\n## Training arguments\n",
            *(table(arguments) if (arguments := training_arguments(model.folder)) else [UNKNOWN]),
            "\n## Metrics\n",
            *(table(metrics) if (metrics := last_metrics(model.folder)) else [UNKNOWN]),
            "\n## Intended use\n",
            INTENDED_USE,
        ]
    )


INTENDED_USE = """\
As an encoder to be fine-tuned for classification, tagging, question answering or retrieval, and for filling masks.
It generates no text. It repeats the biases of the text it was trained on; examine it on your own data before use.

`AutoModel` and `AutoTokenizer` load this folder. `AutoModelForMaskedLM` predicts from the encoder's last state, since
transformers has no enhanced mask decoder; the tensor `deberta.embeddings.position_embeddings.weight`, which it leaves
aside, is what the decoder adds. `DebertaForMaskedLM.from_pretrained` of deberta_xl uses both.
"""


def title(model: Pretrained) -> str:
    """The run's name, or the folder's."""
    run = run_folder(model.folder)
    return (run or model.folder).resolve().name


def table(facts: dict[str, Any]) -> Iterator[str]:
    """Facts as a Markdown table."""
    yield "| | |\n|---|---|"
    for name, value in facts.items():
        yield f"| {name} | {value} |"


def architecture(model: Pretrained) -> dict[str, Any]:
    """Sizes, and the choices that distinguish the releases."""
    config = model.config
    parameters = sum(math.prod(t.shape) for name, t in model.tensors.items() if not is_beside_the_model(name))
    return {
        "parameters": f"{parameters:,}",
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_heads,
        "feed-forward size": config.intermediate_size,
        "vocabulary": f"{config.vocab_size:,}",
        "longest sequence": config.max_position_embeddings,
        "relative positions": f"{config.position_buckets or 'no'} buckets, {config.relative_reach} told apart",
        "position terms": config.pos_att_type.replace("|", ", "),
        "n-gram convolution": f"width {config.conv_kernel_size}" if config.conv_kernel_size else "none",
        "decoder": "none (positions in the input)" if config.position_biased_input else "enhanced mask decoder",
    }


def run_folder(folder: Path) -> Path | None:
    """The run that a checkpoint belongs to."""
    run = folder.resolve().parent.parent
    return run if folder.resolve().parent.name == "checkpoints" and (run / "config.toml").is_file() else None


def data_facts(folder: Path) -> dict[str, Any]:
    """Fingerprints of what a checkpoint was trained on."""
    if not (folder / STATE_NAME).is_file():
        return {}
    state = json.loads((folder / STATE_NAME).read_bytes())
    prints = state.get("fingerprints", {})
    facts = {
        "dataset fingerprint": prints.get("data"),
        "tokenizer fingerprint": prints.get("tokenizer"),
        "sequence length": prints.get("sequence_length"),
        "steps": state.get("step"),
        "sequences seen": state.get("consumed_samples"),
    }
    return {name: json.dumps(v) if isinstance(v, dict) else v for name, v in facts.items() if v is not None}


def training_arguments(folder: Path) -> dict[str, Any]:
    """The run's configuration, section by section."""
    run = run_folder(folder)
    if run is None:
        return {}
    settings = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    # Paths of the machine it was trained on are nobody's business.
    private = {"run", "data"}
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        if isinstance(values, dict) and section not in private
        for key, value in values.items()
        if not (section == "train" and key == "init")
    }


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
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
