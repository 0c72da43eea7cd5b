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
NAME_AT = {built_in.place: name for name, built_in in BUILT_IN.items()}
TOLD_BY_STAGES = ("build", "losses", "reports")
"""What a `Staged` objective tells a second time, for a stage."""
FORM = "it is {names}, or PACKAGE.MODULE:CLASS, as in train.objective=my_package.my_module:MyObjective"


def check_objective(name: str, num_stages: int) -> None:
    """Refuse an objective that cannot be had, or not in so many stages. Imports a user's.

    Raises ConfigError.
    """
    chosen = None if name in BUILT_IN else objective_type(name)
    if num_stages == 1:
        return
    why_no_stages = BUILT_IN[name].why_no_stages if chosen is None else why_no_own_stages(chosen)
    if why_no_stages is not None:
        raise ConfigError(
            f"train.objective={name} {why_no_stages}, so parallel.pipeline_parallel_size={num_stages} cannot be: leave "
            "it at 1, and divide the model by parallel.tensor_parallel_size and the ZeRO stage of the DeepSpeed JSON"
        )
    if chosen is not None:
        check_own_stages(name, chosen)


def why_no_own_stages(chosen: type[Pretraining]) -> str | None:
    """Why the model of a user's class cannot be a pipeline; None where it can."""
    from deberta_xl.objectives.objective import Staged

    told = "does not say what a stage of a pipeline does (it is no Staged of deberta_xl.objectives.objective)"
    return None if issubclass(chosen, Staged) else told


def check_own_stages(name: str, chosen: type[Pretraining]) -> None:
    """Refuse to run an objective in the stages of another that it inherits from: they compute the other's loss.

    Raises ConfigError.
    """
    from deberta_xl.objectives.objective import Objective, Staged

    def owner(*keys: str) -> type:
        """The class in which any of these is last said."""
        return next(c for c in chosen.__mro__ if vars(c).keys() & set(keys))

    of_stages = sorted(Staged.__abstractmethods__ - Objective.__abstractmethods__)
    staged = owner(*of_stages)
    own = {key: owner(key) for key in TOLD_BY_STAGES}
    if changed := [key for key in TOLD_BY_STAGES if own[key] is not staged and issubclass(own[key], staged)]:
        raise ConfigError(
            f"train.objective={name}: {chosen.__name__} has {', '.join(changed)} of its own, but the stages of "
            f"{staged.__name__}: leave parallel.pipeline_parallel_size at 1, or give it what its stages do "
            f"({', '.join(of_stages)}), too"
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


def built_in_of(name: str) -> str | None:
    """The built-in objective that is named, or from which a class of the user's inherits; None for one of its own.

    What is not told again by such a class is as there: under which mask it trains, which sections it reads.
    Raises ConfigError as `objective_type`.
    """
    if name in BUILT_IN:
        return name
    places = (f"{cls.__module__}:{cls.__qualname__}" for cls in objective_type(name).__mro__)
    return next((NAME_AT[place] for place in places if place in NAME_AT), None)


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
