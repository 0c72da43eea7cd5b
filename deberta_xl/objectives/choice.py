"""Which objective `train.objective` names: a built-in one, or a class of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from deberta_xl.base.errors import ConfigError

if TYPE_CHECKING:
    from deberta_xl.objectives.pretraining import Pretraining


class BuiltIn(NamedTuple):
    """One of the package's, as far as it is known without torch."""

    place: str
    """MODULE:CLASS."""
    why_no_stages: str | None = None
    """Why its model cannot be a pipeline; None where it can."""


BUILT_IN = {
    "masked_lm": BuiltIn("deberta_xl.objectives.masked_lm:MaskedLM"),
    "causal": BuiltIn("deberta_xl.objectives.autoregressive:Causal"),
    "prefix": BuiltIn("deberta_xl.objectives.autoregressive:Prefix"),
    "mixed": BuiltIn("deberta_xl.objectives.autoregressive:Mixed"),
    "replaced_tokens": BuiltIn(
        "deberta_xl.objectives.replaced_tokens:ReplacedTokens",
        "trains two models of different depth, the second on what the first has drawn in the same step: stages would "
        "wait for one another twice a step",
    ),
}
TOLD_BY_STAGES = ("build", "micro_batch", "losses", "reports")
"""What a class that `has_stages` tells a second time, for a stage."""
FORM = "it is {names}, or PACKAGE.MODULE:CLASS, as in train.objective=my_package.my_module:MyObjective"


def check_objective(name: str, num_stages: int) -> None:
    """Refuse an objective that cannot be had, or not in so many stages. Imports a user's.

    Raises ConfigError.
    """
    why_no_stages = "does not say what a stage of a pipeline does (has_stages)"
    if name in BUILT_IN:
        chosen, why_no_stages = None, BUILT_IN[name].why_no_stages
    else:
        chosen = objective_type(name)
        why_no_stages = None if chosen.has_stages else why_no_stages
    if num_stages > 1 and why_no_stages is not None:
        raise ConfigError(
            f"train.objective={name} {why_no_stages}, so parallel.pipeline_parallel_size={num_stages} cannot be: leave "
            "it at 1, and divide the model by parallel.tensor_parallel_size and the ZeRO stage of the DeepSpeed JSON"
        )
    if num_stages > 1 and chosen is not None:
        check_own_stages(name, chosen)


def check_own_stages(name: str, chosen: type[Pretraining]) -> None:
    """Refuse to run an objective in the stages of another that it inherits from: they compute the other's loss.

    Raises ConfigError.
    """
    owner = {key: next(c for c in chosen.__mro__ if key in vars(c)) for key in ("has_stages", *TOLD_BY_STAGES)}
    staged = owner["has_stages"]
    if changed := [key for key in TOLD_BY_STAGES if owner[key] is not staged and issubclass(owner[key], staged)]:
        raise ConfigError(
            f"train.objective={name}: {chosen.__name__} has {', '.join(changed)} of its own, but the stages of "
            f"{staged.__name__}: leave parallel.pipeline_parallel_size at 1, or say has_stages = True in it, too, once "
            "build_stage and what begins with stage_ are its own"
        )


def objective_type(name: str) -> type[Pretraining]:
    """The class. A user's module is found on PYTHONPATH, or in the working directory.

    Raises ConfigError when there is no such objective.
    """
    form = FORM.format(names=", ".join(BUILT_IN))
    place = BUILT_IN[name].place if name in BUILT_IN else name
    module_name, colon, class_name = place.partition(":")
    if not (colon and module_name and class_name.isidentifier()):
        raise ConfigError(f"train.objective={name}: no such objective; {form}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: it must hide nothing
    module = import_module(name, module_name, form)
    chosen = getattr(module, class_name, None)
    from deberta_xl.objectives.pretraining import Pretraining

    if not (isinstance(chosen, type) and issubclass(chosen, Pretraining)):
        own = [
            key for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Pretraining) and value.__module__ == module_name
        ]  # fmt: skip
        there = f"it has {', '.join(own)}" if own else "it has none"
        raise ConfigError(
            f"train.objective={name}: {module.__file__} has no class {class_name} below "
            f"deberta_xl.objectives.pretraining.Pretraining; {there}"
        )
    if missing := sorted(chosen.__abstractmethods__):
        raise ConfigError(f"train.objective={name}: {class_name} has no {', '.join(missing)} yet; write it")
    return chosen


def import_module(name: str, module_name: str, form: str) -> Any:
    """The module of an objective. Raises ConfigError for why it cannot be imported."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"train.objective={name}: importing {module_name} fails: {error}") from error
        raise ConfigError(
            f"train.objective={name}: there is no module {error.name} on PYTHONPATH or in {os.getcwd()}; {form}"
        ) from error
    except Exception as error:
        place = f"{type(error).__name__}: {error}"
        raise ConfigError(f"train.objective={name}: importing {module_name} fails with {place}") from error
