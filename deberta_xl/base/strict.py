"""Strict, frozen dataclasses for settings, and the checks they share. Every complaint is a ConfigError."""

from __future__ import annotations

import functools
import math
import os
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from deberta_xl.base.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)

FLOAT32_ROOM = 1e30
"""Largest factor of what is computed in float32, which ends at 3.4e38."""

Class = TypeVar("Class", bound=type)


def own_path(text: str) -> str:
    """A path that a user wrote, with `~` as the home it stands for: in `key=~/x` and in files no shell does that.

    Raises ValueError for what no system takes for a path.
    """
    if "\0" in text:
        raise ValueError("a path holds no NUL")
    return os.path.expanduser(text)


UserPath = Annotated[str, AfterValidator(own_path)]
"""The type of a setting that is a path."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def frozen(cls: Class) -> Class:
    """A dataclass of settings: immutable, keyword-only, strict about types and unknown keys."""
    built = dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    validate = built.__init__

    @functools.wraps(validate)
    def initialize(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    built.__init__ = initialize
    return built


def explain(error: ValidationError) -> str:
    """The first finding of pydantic's in a user's words: `key=value: what is wrong`."""
    finding = error.errors()[0]
    if isinstance(cause := finding.get("ctx", {}).get("error"), ConfigError):
        return str(cause)
    key = ".".join(map(str, finding["loc"]))
    if finding["type"] == "missing":
        return f"{key} is missing"
    return f"{key}={finding['input']!r}: {finding['msg']}"


def divisors(number: int) -> list[int]:
    """The divisors of `number`, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def probability(name: str, value: float) -> None:
    """Refuse a `value` outside [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is not a probability below 1; allowed: 0 <= {name} < 1")


def at_least(minimum: float, **values: float | None) -> None:
    """Refuse every one of `values` that lies below `minimum`; None is allowed."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"{name}={value} is too small; it must be at least {minimum}")


def at_most(maximum: float, **values: float | None) -> None:
    """Refuse every one of `values` that lies above `maximum`; None is allowed."""
    for name, value in values.items():
        if value is not None and value > maximum:
            raise ConfigError(f"{name}={value} is too large; it must be at most {maximum}")


def positive(**values: float) -> None:
    """Refuse every one of `values` that is not above 0, or by which float32 cannot multiply or divide."""
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name}={value} must be greater than 0")
        if not 1 / FLOAT32_ROOM <= value <= FLOAT32_ROOM:
            raise ConfigError(
                f"{name}={value} is beyond float32; it must lie in {1 / FLOAT32_ROOM:g} … {FLOAT32_ROOM:g}"
            )
