"""Our own `config.json`: the architecture beside native weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pydantic import ValidationError

from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.settings.architecture import DebertaConfig

MODEL_TYPE = "deberta_xl"


def native_config(config: DebertaConfig) -> dict[str, object]:
    """Contents of a native `config.json`. Were it `deberta-v2`, transformers would load it and keep no weight."""
    return {"model_type": MODEL_TYPE, **dataclasses.asdict(config)}


def read_native_config(path: Path) -> DebertaConfig:
    """The architecture in a native `config.json`. Raises CheckpointError when there is none in `path`."""
    try:
        fields = read_json(path)
        model_type = fields.pop("model_type", None)
        if model_type != MODEL_TYPE:
            raise CheckpointError(f"{path} has model_type {model_type!r}, not {MODEL_TYPE!r}: no configuration of ours")
        return DebertaConfig(**fields)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: without it the weights' architecture is not known") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a configuration of a {MODEL_TYPE} model: {explain(error)}") from error


def explain(error: Exception) -> str:
    """The first thing that is wrong with a configuration, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    finding = error.errors()[0]
    cause = finding.get("ctx", {}).get("error")
    return str(cause or f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}")
